"""The Dense DPO example, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "dense_dpo.py"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--quick", "--output_dir", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("dense_dpo")
    process = run(folder)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder


def test_the_report_sets_dense_dpo_beside_dpo_sft_and_the_start(finished):
    report = json.loads((finished / "report" / "report.json").read_text())
    names = [arm["name"].partition(", lr ")[0] for arm in report["arms"]]
    assert names == ["supervised model", "SFT on chosen", "DPO", "Dense DPO"]
    for arm in report["arms"]:
        assert set(arm["metrics"]) == {"iid, greedy", "iid, sampled", "adv, greedy", "adv, sampled"}
    first = {arm["name"].partition(",")[0]: arm["history"][0] for arm in report["arms"][1:]}
    # DPO starts at ln 2 beside the anchor, of which SFT is the whole loss; the preset weighs segments.
    assert first["DPO"]["loss"] - first["SFT on chosen"]["loss"] == pytest.approx(0.6931, abs=2e-3)
    assert 0 < first["Dense DPO"]["dense/changed_share"] <= 1


def test_a_finished_arm_is_not_trained_again(finished):
    weights = finished / "dense_0.0003" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert run(finished, "--arms", "dense").returncode == 0
    assert weights.stat().st_mtime_ns == stamp


def study(folder, **options):
    sys.path.insert(0, str(SCRIPT.parent))
    import preference_study

    sys.path.pop(0)
    filled = preference_study.Options(output_dir=str(folder), **options)
    return preference_study.Study("test", filled, preference_study.ModelConfig(), {"sft": "SFT", "dpo": "DPO"})


def test_the_learning_rate_with_the_best_f1_of_objects_on_the_development_split_is_kept(tmp_path, monkeypatch):
    tuned = study(tmp_path, learning_rates=[1e-4, 3e-4, 1e-3])
    # Says little and nothing wrong; says all with some errors; says all and much that is wrong.
    scores = {"sft_0.0001": (0.0, 0.4), "sft_0.0003": (0.1, 0.9), "sft_0.001": (0.5, 1.0)}
    asked = []

    def evaluated(folder, split):
        asked.append(split)
        chair_i, recall = scores[folder.name]
        return {"adv, greedy": {"chair_i": chair_i, "recall": recall}}

    monkeypatch.setattr(tuned, "evaluated", evaluated)
    assert tuned.best("sft") == 3e-4
    assert asked == ["development"] * 3


def test_an_unknown_arm_is_named(tmp_path):
    with pytest.raises(SystemExit, match="`--arms` has ppo; choose from sft, dpo"):
        study(tmp_path, arms=["ppo"], learning_rates=[1e-4])
