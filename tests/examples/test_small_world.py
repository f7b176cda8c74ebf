"""The notebook runs from its first cell to its last, in a kernel of its own, and what it says of itself is true."""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "small_world.ipynb"


def text_of(cell) -> str:
    return "".join(part.get("text", "") for part in cell.get("outputs", ()))


@pytest.fixture
def executed(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("SMALL_WORLD_QUICK", "1")
    monkeypatch.setenv("SMALL_WORLD_FOLDER", str(tmp_path / "world"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return notebook


def test_the_notebook_runs_and_ends_with_numbers_before_and_after(executed, tmp_path):
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("rejected:" in text_of(cell) and "chosen:" in text_of(cell) for cell in cells)
    lines = text_of(cells[-1]).splitlines()
    assert [line.split()[0] for line in lines] == ["chair_i", "recall", "repeats"] and all(
        "->" in line for line in lines
    )
    assert (tmp_path / "world" / "model" / "model.safetensors").exists()
    for cell in cells:
        assert not [part for part in cell.outputs if part.get("name") == "stderr"], cell.source


def test_the_saved_outputs_are_those_of_a_whole_run_and_name_no_folder():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    text = json.dumps([cell["outputs"] for cell in cells])
    assert "/work" not in text and "/tmp" not in text and "stderr" not in text
    (last,) = ("".join(part["text"]) for part in cells[-1]["outputs"])
    before, after = (float(value) for value in last.splitlines()[0].removesuffix("%").split()[1:] if value != "->")
    assert after < before / 2
