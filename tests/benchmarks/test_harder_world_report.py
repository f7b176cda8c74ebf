"""The page of the harder world: lines by hand."""

import pytest

from benchmarks.studies.harder_world_report import page, percent

TITLES = {
    "supervised": "supervised model",
    "chosen": "the corrected replies themselves",
    "sft": "supervised",
    "dpo": "DPO",
    "dense": "Dense DPO",
}
COMPARISONS = {"Preference?": ("sft", ("dpo", "dense")), "Dense?": ("dpo", ("dense",))}
NAMES = ("untrue", "chair_i", "attributes", "recall", "repeats", "broken")


def measured(first):
    values = {name: first + place / 100 for place, name in enumerate(NAMES)}
    greedy, balanced = {"untrue": 0.01, "recall": 0.9}, {"chair_i": 0.02}
    return {"adv, sampled": values, "adv, greedy": greedy, "balanced, sampled": balanced, "questions": {"pope": 0.95}}


def result(sft, dpo, difference):
    prior = {"fluent": 0.99, "usual_partners": 0.8, "perplexity_hidden": 2.0, "perplexity_seen": 1.5}
    arms = {
        "sft": {"cell": [3e-4, 0.0], "cells": 2, "values": measured(sft)},
        "dpo": {"cell": [1e-3, 1.0], "cells": 2, "values": measured(dpo)},
    }
    found = {name: [difference, difference - 0.01, difference + 0.01] for name in ("untrue", "chair_i", "recall")}
    return {"prior": prior, "supervised": measured(0.3), "arms": arms, "differences": {"dpo - sft": found}}


def test_every_arm_and_seed_has_a_line_and_seeds_their_mean():
    lines = page("long", {"0": result(0.2, 0.1, -0.1), "4": result(0.4, 0.3, -0.2)}, TITLES, COMPARISONS).splitlines()
    rest = "1.0 | 90.0 | 2.0 | 95.0 |"
    assert f"| DPO | 0 | 0.001, 1 | 2 | 10.0 | 11.0 | 12.0 | 13.0 | 14.0 | 15.0 | {rest}" in lines
    assert f"| supervised | mean |  |  | 30.0 | 31.0 | 32.0 | 33.0 | 34.0 | 35.0 | {rest}" in lines
    assert f"| supervised model | 4 |  |  | 30.0 | 31.0 | 32.0 | 33.0 | 34.0 | 35.0 | {rest}" in lines
    assert "| 4 | 99.0 | 80.0 | - | 2.00 | 1.50 |" in lines
    assert not any("Dense" in line for line in lines)  # neither an arm that was not run nor its question


def test_differences_have_an_interval_over_scenes_and_their_mean_one_over_seeds():
    lines = page("long", {"0": result(0.2, 0.1, -0.1), "4": result(0.4, 0.3, -0.2)}, TITLES, COMPARISONS).splitlines()
    first, second, mean = [line for line in lines if line.startswith("| DPO | ") and "(" in line]
    assert first == "| DPO | 0 | -10.0 (-11.0 to -9.0) | -10.0 (-11.0 to -9.0) | - | -10.0 (-11.0 to -9.0) | - |"
    assert second.startswith("| DPO | 4 | -20.0 (-21.0 to -19.0)")
    # Student: -15 -+ 12.71 * 7.071 / sqrt(2) = -15 -+ 63.55
    assert mean.startswith("| DPO | mean of 2 | **-15.0 (-78.5 to +48.5)** |")


def test_the_corrected_replies_have_a_line_of_what_they_invent_themselves():
    chosen = {"adv, sampled": {}, "adv, greedy": {}, "balanced, sampled": {"chair_i": 0.123}}
    lines = page("long", {"0": result(0.2, 0.1, -0.1) | {"chosen": chosen}}, TITLES, COMPARISONS).splitlines()
    assert f"| the corrected replies themselves | 0 |  |  | {'- | ' * 8}12.3 | - |" in lines


def test_one_seed_has_no_interval_over_seeds():
    text = page("long", {"0": result(0.2, 0.1, -0.1)}, TITLES, COMPARISONS)
    assert "mean" not in text.partition("## Every arm")[2]


@pytest.mark.parametrize("value, text", [(None, "-"), (0.1234, "12.3")])
def test_what_was_not_measured_has_a_dash(value, text):
    assert percent(value) == text
