"""`--families quick`: what `make quick` leaves out."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def collected(*options):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run([*command, str(HERE / "test_families.py")], capture_output=True, text=True, cwd=HERE.parent)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_quick_runs_a_grid_for_two_families_and_leaves_other_tests_alone():
    quick = collected("--families", "quick")
    assert {line.partition("[")[2] for line in quick} - {""} == {"llava]", "qwen2_5_vl]"}
    everything = collected()
    assert len(everything) > len(quick)
    assert {line for line in everything if "[" not in line} == {line for line in quick if "[" not in line}
