import sys

import pytest

import trl_vlm.testbed
from trl_vlm.testbed import __main__ as command


def test_every_offered_name_loads():
    for name in trl_vlm.testbed.__all__:
        assert getattr(trl_vlm.testbed, name) is not None
    with pytest.raises(AttributeError, match="It offers: .*World"):
        _ = trl_vlm.testbed.Wordl


@pytest.mark.parametrize("name", ["sheet.html", "sheet.png"])
def test_the_command_writes_a_page_or_a_picture(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["testbed", "--out", str(tmp_path / name), "--count", "1"])
    command.main()
    content = (tmp_path / name).read_bytes()
    assert b"Anchors and partners" in content if name.endswith(".html") else content.startswith(b"\x89PNG")
