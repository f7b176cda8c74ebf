import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_vlm.testbed


def test_every_offered_name_loads():
    for name in trl_vlm.testbed.__all__:
        assert getattr(trl_vlm.testbed, name) is not None
    with pytest.raises(AttributeError, match="It offers: .*World"):
        _ = trl_vlm.testbed.Wordl


def test_the_command_writes_a_page_without_loading_torch(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['testbed', '--out', 'sheet.html', '--count', '1'];"
        "runpy.run_module('trl_vlm.testbed', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(trl_vlm.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert "Anchors and partners" in (tmp_path / "sheet.html").read_text()
