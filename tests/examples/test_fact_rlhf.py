"""The main job, as a user runs it: to its end, and killed in every stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "fact_rlhf.py"
STAGES = ("sft", "reward", "ppo", "evaluate")


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--quick", "--output_dir", str(folder), *options]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    finished = subprocess.run(command(folder, *options), capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def metrics(folder: Path) -> list[dict]:
    return [arm["metrics"] for arm in json.loads((folder / "report" / "report.json").read_text())["arms"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("fact_rlhf")
    run(folder)
    return folder


def test_the_run_ends_with_a_report_of_three_models(finished):
    report = json.loads((finished / "report" / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["supervised model", "PPO, with facts", "PPO, without facts"]
    for arm in report["arms"]:
        assert set(arm["metrics"]) == {"iid, greedy", "iid, sampled", "adv, greedy", "adv, sampled"}
    assert all(any("ppo/score" in entry for entry in arm["history"]) for arm in report["arms"][1:])
    table = (finished / "report" / "report.md").read_text()
    for row in ("CHAIR_i", "CHAIR_s", "object recall", "repeats", "POPE adversarial accuracy", "KL to the start"):
        assert row in table
    assert all((finished / "report" / name).stat().st_size > 1000 for name in report["plots"])


def test_a_finished_stage_is_not_run_again(finished):
    stamp = (finished / "ppo_facts" / "model.safetensors").stat().st_mtime_ns
    run(finished, "--stages", "sft", "reward", "ppo")
    assert (finished / "ppo_facts" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_stage_is_not_continued_with_other_settings_and_the_difference_is_named(finished):
    failed = subprocess.run(
        command(finished, "--kl_coef", "0.9", "--vision_noise", "0.1"), capture_output=True, text=True, timeout=300
    )
    assert failed.returncode != 0
    assert "`vision_noise` was 0.6 and is now 0.1" in failed.stderr and "Traceback" not in failed.stderr
    assert (finished / "report" / "report.json").exists()


@pytest.mark.slow
def test_killed_in_every_stage_it_resumes_and_ends_with_the_same_report(finished, tmp_path):
    # What a stage has written by the time that it is killed: a checkpoint each.
    for pattern in ("sft/training/*/checkpoint-*", "reward_facts/checkpoint-*", "ppo_facts/checkpoint-*"):
        process = subprocess.Popen(
            command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 400
        while not list(tmp_path.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, f"the run ended before {pattern} appeared"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "report").exists()
    run(tmp_path)
    assert metrics(tmp_path) == metrics(finished)


def test_a_stage_without_its_predecessor_says_which_one_to_run(tmp_path):
    failed = subprocess.run(command(tmp_path, "--stages", "evaluate"), capture_output=True, text=True, timeout=300)
    assert failed.returncode != 0
    assert "run the stage that makes it" in failed.stderr
