"""The main job, as a user runs it: to its end, and killed in every stage."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "fact_rlhf.py"
STAGES = ("sft", "reward", "ppo", "evaluate")


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--quick", "--output_dir", str(folder), *options]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    finished = subprocess.run(command(folder, *options), capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


NAMES = ["supervised model", "PPO, with facts", "PPO, without facts"]


def metrics(folder: Path) -> list[dict]:
    return [arm["metrics"] for arm in json.loads((folder / "report" / "report.json").read_text())["arms"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("fact_rlhf")
    done = run(folder, "--side_by_side", "True")
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_the_run_ends_with_a_report_of_three_models(finished):
    report = json.loads((finished / "report" / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == NAMES
    splits = {f"{split}, {kind}" for split in ("iid", "adv") for kind in ("greedy", "sampled", "questions")}
    for arm in report["arms"]:
        assert set(arm["metrics"]) == splits
    for arm in report["arms"][1:]:
        logged = [entry for entry in arm["history"] if "eval/testbed_captions_adv_chair_i" in entry]
        assert len(logged) == 3 and any("ppo/score" in entry for entry in arm["history"])
    table = (finished / "report" / "report.md").read_text()
    for row in ("CHAIR_i", "CHAIR_s", "object recall", "repeats", "POPE adversarial accuracy", "KL to the start"):
        assert row in table
    assert all((finished / "report" / name).stat().st_size > 1000 for name in report["plots"])


def test_the_last_screen_is_three_sentences_a_table_and_the_page(finished):
    text = (finished / "report" / "summary.txt").read_text()
    assert (finished / "stdout.txt").read_text().endswith(text)
    lines = text.splitlines()
    assert len(lines) <= 40 and max(map(len, lines[:-1])) <= 100  # the last line is as long as the path in it
    for words in ("Of 100 objects that the model named,", "Of 100 objects that are in the pictures,", "With facts"):
        assert any(line.startswith(words) for line in lines)
    assert not any(cell in ("-", "–") for line in lines for cell in line.split())
    page = finished / "report" / "page.html"
    assert lines[-1] == f"Replies before and after, side by side: {page}"
    content = page.read_text()
    for words in ("supervised_model", "PPO_with_facts", "testbed-captions", "images-0"):
        assert words in content


def test_the_command_the_callback_and_the_example_report_the_same_numbers(finished, tmp_path, capsys):
    """One rule: replies are generated greedily (or by the question's seed), and answers are read from their words."""
    from trl import RLOOConfig  # only here: what imports trl takes seconds

    from trl_vlm import EvaluationCallback, RLOOTrainer
    from trl_vlm.cli.main import main
    from trl_vlm.models import load_processor
    from trl_vlm.testbed.benchmark import TESTBED

    policy, scenes = str(finished / "ppo_facts"), finished / "scenes"
    words = ["--tasks", "trl_vlm.testbed.benchmark:TESTBED", "--data", str(scenes), "--output", str(tmp_path / "out")]
    assert main(["evaluate", policy, *words, "--batch-size", "5", "--json"]) == 0
    by_command = {each["task"]: each["metrics"] for each in json.loads(capsys.readouterr().out)}

    results = json.loads((finished / "evaluation" / "results.json").read_text())["results"]
    by_example = {each["task"]: each["metrics"] for each in results if each["model"] == NAMES[1]}
    assert by_command.keys() == by_example.keys()
    for task, metrics in by_example.items():
        assert by_command[task] == pytest.approx(metrics, abs=1e-12)

    arguments = RLOOConfig(str(tmp_path / "run"), report_to="none", use_cpu=True, bf16=False, num_generations=2)
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "describe the image"}]}]),
        processing_class=load_processor(policy, padding_side="left"),
    )
    logged = EvaluationCallback(trainer, TESTBED, scenes, every_steps=1, limit=None, batch_size=7).evaluate()
    expected = {
        f"eval/{task.replace('-', '_')}_{name}": value
        for task, metrics in by_example.items()
        for name, value in metrics.items()
        if value is not None
    }
    assert logged == pytest.approx(expected, abs=1e-12)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_arms_run_side_by_side_with_the_result_of_one_after_the_other(finished, tmp_path):
    in_turn = run(tmp_path, "--side_by_side", "False")
    assert metrics(tmp_path) == metrics(finished)
    assert "no_facts | " not in in_turn.stderr
    apart = run(finished, "--stages", "sft").stderr  # nothing is left to do apart
    assert "no_facts | " not in apart


def test_the_console_says_what_each_stage_does_and_names_the_arm_of_a_line(finished):
    shown = (finished / "stderr.txt").read_text()
    for number, stage in enumerate(STAGES, 1):
        assert f"[{number}/4] {stage}\n    " in shown
    for arm in ("facts", "no_facts"):
        assert re.search(rf"^{arm} \| +\d+/8  loss .* ppo/score", shown, flags=re.MULTILINE)
    assert not re.search(r"\{'\w+': |it/s\]|Warning", shown)


def test_a_finished_stage_is_not_run_again(finished):
    stamp = (finished / "ppo_facts" / "model.safetensors").stat().st_mtime_ns
    run(finished, "--stages", "sft", "reward", "ppo")
    assert (finished / "ppo_facts" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_stage_is_not_continued_with_other_settings_and_the_difference_is_named(finished):
    failed = subprocess.run(
        command(finished, "--kl_coef", "0.9", "--vision_noise", "0.1"), capture_output=True, text=True, timeout=300
    )
    assert failed.returncode != 0
    assert "`vision_noise` was 1.5 and is now 0.1" in failed.stderr and "Traceback" not in failed.stderr
    assert (finished / "report" / "report.json").exists()


def test_replies_of_a_policy_that_has_changed_are_not_taken_for_those_of_the_new_one(finished):
    weights = finished / "ppo_facts" / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    failed = subprocess.run(command(finished, "--stages", "evaluate"), capture_output=True, text=True, timeout=300)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert failed.returncode != 0
    assert "holds replies with other settings (files)" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.nightly
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
