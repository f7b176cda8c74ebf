"""The check of a GPU, with a tiny model on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*options):
    command = [sys.executable, "-m", "benchmarks.gpu_check", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_parts_report_what_they_measured(tmp_path):
    output = tmp_path / "report.json"
    done = run("--tiny", "--only", "environment,sdpa,dpo,reward,bdhs,multi_gpu", "--output", output)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(output.read_text())
    assert list(report) == ["environment", "sdpa", "dpo", "reward", "bdhs", "multi_gpu"]
    assert report["sdpa"]["largest_difference"] < 0.05  # bfloat16
    assert report["dpo"]["tiny/ours"]["shares_prefix"] and not report["dpo"]["tiny/ours_plain"]["shares_prefix"]
    assert report["dpo"]["tiny/largest_loss_difference"] < 0.01
    assert report["reward"]["shared"]["seconds_per_step"] > 0
    assert report["reward"]["scoring_float32"]["different_scores"] > 1
    assert report["bdhs"]["rows_per_second"] > 0


def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path, monkeypatch, capsys):
    from benchmarks import gpu_check

    def broken(setting):
        raise RuntimeError("no such kernel")

    output = tmp_path / "report.json"
    monkeypatch.setitem(gpu_check.PARTS, "dense", broken)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--tiny", "--only", "dense,environment", "--output", str(output)])
    assert gpu_check.main() == 1
    report = json.loads(output.read_text())
    assert report["dense"]["error"] == "RuntimeError: no such kernel" and "torch" in report["environment"]
    assert "no such kernel" in capsys.readouterr().out


def test_an_unknown_part_is_named(monkeypatch):
    from benchmarks import gpu_check

    monkeypatch.setattr(sys, "argv", ["gpu_check", "--tiny", "--only", "sdpa,speed"])
    with pytest.raises(SystemExit, match="There is no part speed. The parts are environment, sdpa,"):
        gpu_check.main()
