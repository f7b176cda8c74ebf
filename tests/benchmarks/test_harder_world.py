"""The study of the harder world: its choices by hand, and a run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from benchmarks.studies import harder_world_measures
from benchmarks.studies.harder_world import compare, weakened
from benchmarks.studies.harder_world_arms import ARMS, CELLS, COMPARISONS, START, Cell, chosen
from benchmarks.studies.harder_world_measures import captions, paired, values
from trl_vlm.pairs import Policy
from trl_vlm.testbed import build_model, build_processor
from trl_vlm.testbed.datasets import preference_rows
from trl_vlm.testbed.world import World, generator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_every_arm_has_the_same_number_of_cells_and_every_comparison_known_arms():
    assert {len(set(arm.cells)) for arm in ARMS.values()} == {len(CELLS)}
    from_start, *among_arms = COMPARISONS.values()
    assert from_start == (START, tuple(ARMS))
    assert {arm for reference, others in among_arms for arm in (reference, *others)} == set(ARMS)


def test_the_cell_that_says_the_least_untrue_is_kept_among_those_that_keep_recall():
    low, middle, high = Cell(1e-4, 1.0), Cell(3e-4, 1.0), Cell(1e-3, 1.0)
    scores = {low: (0.2, 0.90), middle: (0.1, 0.895), high: (0.02, 0.5)}
    assert chosen(scores, recall=0.9) == middle
    assert chosen(scores, recall=0.4) == high
    assert chosen(scores, recall=0.99) == low  # none keeps it: the one that keeps most


def measured(untrue):
    return {
        "adv, sampled": {"untrue": [untrue, [4, 4, 2]], "recall": [[1, 1, 1], [2, 2, 2]], "attributes": [[0] * 3] * 2}
    }


def test_numbers_are_quotients_of_sums_and_what_was_not_told_is_left_out():
    assert values(measured([1, 2, 1])) == {"adv, sampled": {"untrue": 0.4, "recall": 0.5}}


def test_differences_are_paired_over_the_same_scenes():
    found = paired(measured([1, 2, 1]), measured([0, 2, 0]))
    assert found["untrue"][0] == pytest.approx(-0.2)
    assert found["untrue"][1] <= found["untrue"][0] <= found["untrue"][2] <= 0
    assert found["recall"] == [0, 0, 0]
    assert "attributes" not in found


def test_what_captions_say_is_counted_by_hand(monkeypatch):
    world, processor = World(attributes=True), build_processor(attributes=True)
    scene = world.picture(generator(5, 0, "adv"), "adv").scene
    first, second = list(scene.statements.values())[:2]
    absent = next(kind for kind in world.kinds if kind not in scene.kinds)
    wrong = second._replace(size={"small": "large", "large": "small"}[second.size])
    invented = f"small red {absent} on the left"
    reply = f"there is a {first.phrase} . i see a {wrong.phrase} . i see a {invented} . there is a small ."
    monkeypatch.setattr(harder_world_measures, "generate_captions", lambda *args, **options: [reply])
    policy = Policy(build_model(processor), processor)
    found = captions(policy, world, "adv", 1, 5, True)
    assert found["untrue"] == [[3], [4]]  # the second, the absent one, the broken one
    assert found["chair_i"] == [[1], [3]]
    assert found["attributes"] == [[1], [6]]
    assert found["recall"] == [[2], [len(scene.kinds)]]
    assert found["broken"] == [[1], [4]]


def test_weakened_rows_are_those_that_the_labeler_gives_for_weak_eyes():
    def sample(images, seed):
        return [f"there is a {('bat', 'book')[(seed + place) % 2]} ." for place in range(len(images))]

    sharp, weak = (preference_rows(World(), 4, 0, sample, vision_noise=noise) for noise in (0.0, 0.6))
    found = weakened(sharp, 0.6)
    assert found.column_names == weak.column_names
    for one, other, plain in zip(found, weak, sharp, strict=True):
        assert one["images"][0].tobytes() == other["images"][0].tobytes() != plain["images"][0].tobytes()
        assert {**one, "images": 0} == {**other, "images": 0}
    assert weakened(sharp, 0.0) is sharp


def test_arms_are_compared_that_were_tuned_as_much():
    terms = {name: measured([1, 2, 1]) for name in (START, "sft", "dpo", "dense_diff")}
    found = {"arms": {"sft": {"cells": 3}, "dpo": {"cells": 3}, "dense_diff": {"cells": 2}}}
    found["differences"] = {"dense_diff - dpo": "made when both had two cells", "bdhs - self": "of an earlier call"}
    compare(found, terms)
    from_start = {f"{arm} - supervised" for arm in ("sft", "dpo", "dense_diff")}
    assert set(found["differences"]) == from_start | {"dpo - sft", "bdhs - self"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the study with some arms in one folder."""
    folder = tmp_path_factory.mktemp("harder_world")

    def call(*options: str) -> tuple[dict, str]:
        command = [sys.executable, "-m", "benchmarks.studies.harder_world", "--quick", "--seeds", "0", "--cells", "1"]
        command += ["--output_dir", str(folder), "--results_dir", str(folder / "results"), *options]
        process = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=ROOT)
        assert process.returncode == 0, process.stderr[-3000:]
        results = folder / "results" / "harder_world_attributes.json"
        return json.loads(results.read_text())["0"], results.with_suffix(".md").read_text()

    call.folder = folder
    return call


@pytest.mark.nightly
def test_the_study_runs_and_goes_on_with_further_arms(run):
    found, text = run("--arms", "sft", "dpo", "dense_spans", "image_mask")
    arms = {"sft", "dpo", "dense_spans", "image_mask"}
    assert set(found["arms"]) == arms
    among_arms = {"dpo - sft", "dense_spans - sft", "dense_spans - dpo", "image_mask - dpo"}
    assert set(found["differences"]) == among_arms | {f"{arm} - supervised" for arm in arms}
    assert "## The image side" in text and "## Where rejected replies come from" not in text
    weights = run.folder / "attributes" / "seed0" / "dpo_0.0003_1" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    found, text = run("--arms", "self", "bdhs", "dense_diff")
    assert set(found["arms"]) == {"sft", "dpo", "dense_spans", "image_mask", "self", "bdhs", "dense_diff"}
    # Also with an arm of the earlier call.
    assert {"bdhs - self", "dpo - sft", "dense_diff - dpo"} <= found["differences"].keys()
    assert weights.stat().st_mtime_ns == stamp


@pytest.mark.nightly
def test_rankings_corrections_and_pairs_judged_before_or_during_training_run(run):
    found, text = run("--arms", "dpo", "rankings", "few", "offline", "mixed", "online")
    assert {"rankings", "few", "offline", "mixed", "online"} <= set(found["arms"])
    assert {"dpo - rankings", "few - rankings", "mixed - offline", "online - offline"} <= found["differences"].keys()
    assert "## Corrections against rankings" in text and "## When replies are drawn and judged" in text
    root = run.folder / "attributes" / "seed0"
    assert Dataset.from_parquet(str(root / "rankings.parquet")).num_rows == 3 * 8
    made = {arm: json.loads((root / f"{arm}_0.0003_1" / "history.json").read_text())[0] for arm in ("few", "online")}
    assert "pairs/undecided" in made["online"] and "pairs/undecided" not in made["few"]


@pytest.mark.nightly
def test_reward_models_of_all_sights_and_ppo_run(run):
    found, text = run("--arms", "facts@1.5", "no_facts@1.5")
    assert {"facts@1.5", "no_facts@1.5"} <= set(found["arms"])
    assert "## Facts, where the reward model's noise is 1.5" in text
