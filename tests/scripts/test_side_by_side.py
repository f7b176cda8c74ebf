"""Parts side by side: at the same time, all or none, and never longer than the process that started them."""

import io
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from trl_vlm.scripts.side_by_side import NamedLines, side_by_side

ROOT = Path(__file__).parents[2]


def meet(folder: Path, own: str, other: str) -> None:
    """Ends only if the other part runs meanwhile."""
    (folder / own).write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while not (folder / other).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    print(f"{own} met {other}")


def fail() -> None:
    raise ValueError("no")


def stay(file: Path) -> None:
    file.write_text(str(os.getpid()))
    time.sleep(60)


def waited_for(file: Path) -> int:
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(file.read_text())


def has_ended(process: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(process, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_parts_run_at_the_same_time_once_they_are_told_to(tmp_path, capfd):
    with side_by_side(
        {"a": partial(partial, meet, tmp_path, "a", "b"), "b": partial(partial, meet, tmp_path, "b", "a")}
    ) as begin:
        time.sleep(0.2)
        assert not list(tmp_path.iterdir())
        begin()
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}
    assert os.getpid() not in {int(file.read_text()) for file in tmp_path.iterdir()}
    shown = capfd.readouterr().err
    assert "a | a met b\n" in shown and "b | b met a\n" in shown


def test_one_that_fails_ends_the_others_and_the_program(tmp_path, capfd):
    parts = {"bad": fail, "long": partial(stay, tmp_path / "long")}
    said = "error: bad ended with exit code 1. What it had done is kept"
    with pytest.raises(SystemExit, match=said), side_by_side(parts) as begin:
        begin()
        waited_for(tmp_path / "long")
    assert has_ended(int((tmp_path / "long").read_text()))
    assert "bad | ValueError: no" in capfd.readouterr().err


def test_an_error_in_the_block_ends_them_too(tmp_path):
    part = partial(stay, tmp_path / "long")
    with pytest.raises(KeyError, match="here"), side_by_side({"long": part}) as begin:
        begin()
        waited_for(tmp_path / "long")
        raise KeyError("here")
    assert has_ended(int((tmp_path / "long").read_text()))


PROGRAM = """
import sys
from functools import partial
from pathlib import Path
from tests.scripts.test_side_by_side import stay
from trl_vlm.scripts.side_by_side import side_by_side

if __name__ == "__main__":
    with side_by_side({"long": partial(stay, Path(sys.argv[1]))}) as begin:
        begin()
"""


def test_they_end_when_the_program_is_killed(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = subprocess.Popen([sys.executable, str(file), str(tmp_path / "long")], env=environment)
    process = waited_for(tmp_path / "long")
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert has_ended(process)


def test_lines_get_the_name_whole_and_bars_leave_their_last_state():
    stream = io.StringIO()
    lines = NamedLines("arm", stream)
    lines.write("one\ntw")
    assert stream.getvalue() == "arm | one\n"
    lines.write("o\n10 %\r100 %\n")
    assert stream.getvalue() == "arm | one\narm | two\narm | 100 %\n"
    assert not lines.isatty()
