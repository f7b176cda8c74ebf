import dataclasses

import pytest

from trl_vlm.evaluation import RunSettings, Subject, find_benchmark, run_benchmarks
from trl_vlm.evaluation.benchmark import Record
from trl_vlm.testbed.benchmark import CAPTION, scenes_benchmark
from trl_vlm.testbed.evaluate import evaluate

SCENES, SEED = 4, 5
# The benchmark's name of a number, and that of `ChairScores`.
CAPTIONS = {"i": "chair_i", "i_distinct": "chair_i_distinct", "s": "chair_s", "s_refined": "chair_s_refined",
            "recall": "recall", "length_words": "length_words", "empty": "empty"}  # fmt: skip


def test_the_command_and_the_testbeds_evaluation_report_the_same_captions(model, processor, world, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    benchmark = scenes_benchmark(world, scenes=SCENES, seed=SEED)
    captions = dataclasses.replace(
        benchmark, read=lambda data: [q for q in benchmark.read(data) if q.truth["kind"] == CAPTION]
    )
    settings = RunSettings(tmp_path, tmp_path / "out", batch_size=3, progress=False)
    (result,) = run_benchmarks([Subject("m", str(tmp_path / "model"))], [captions], settings)
    expected = evaluate(model, processor, world, scenes=SCENES, seed=SEED)
    assert result.metrics["iid_length_words"] > 1
    for split in ("iid", "adv"):
        for name, other in CAPTIONS.items():
            assert result.metrics[f"{split}_{name}"] == pytest.approx(expected[f"{split}/greedy/{other}"]), name


def test_captions_and_answers_that_are_right_have_full_marks(world, tmp_path):
    benchmark = scenes_benchmark(world, scenes=SCENES, seed=SEED)
    questions = benchmark.read(tmp_path)
    replies = {q.id: q.truth.get("answer") or " . ".join(q.truth["objects"]) for q in questions}
    records = [Record(q.id, q.group, q.text, replies[q.id], q.truth, True) for q in questions]
    metrics = benchmark.score(records).metrics
    for split in ("iid", "adv"):
        assert metrics[f"{split}_i"] == 0 and metrics[f"{split}_recall"] == 1
        assert metrics[f"{split}_pope_random_accuracy"] == 1 and metrics[f"{split}_pope_random_yes_rate"] == 0.5
    named = {metric.key for metric in benchmark.metrics}
    assert metrics.keys() - named == {"iid_i_surfaces", "adv_i_surfaces"}


def test_the_testbed_is_found_by_its_place():
    assert find_benchmark("trl_vlm.testbed.benchmark:TESTBED").name == "testbed"
    with pytest.raises(ValueError, match="cannot be imported"):
        find_benchmark("trl_vlm.testbed.benchmark:OTHER")
