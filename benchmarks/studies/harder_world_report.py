"""The page of `harder_world.py`: every arm and seed, and paired differences with their intervals."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

SHOWN = {
    "untrue": "untrue sentences",
    "chair_i": "CHAIR_i",
    "attributes": "wrong attributes",
    "recall": "recall",
    "repeats": "repeats",
    "broken": "broken",
}
COMPARED = ("untrue", "chair_i", "attributes", "recall", "repeats")
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
ABOUT = """Everything in percent. *Untrue sentences* name what is absent, tell a wrong attribute, or are *broken*: they
cannot be read. Sampled captions of scenes in which partners, and usual sizes and colors, are mostly absent (`adv`),
where not said otherwise. Each arm has as many tuning cells as its column says; the one kept says the least that is
untrue on a development split, among those whose recall there is at most one point below the supervised model's. It was
measured once, on 300 fresh scenes. Seeds differ in world, model, rows and scenes."""


def page(
    world: str, results: Mapping[str, Any], titles: Mapping[str, str], comparisons: Mapping[str, tuple[str, Sequence]]
) -> str:
    """The whole page.

    Args:
        world: Its name on the command line.
        results: Seed to what was measured: `prior`, `supervised`, `arms` and `differences`.
        titles: Arm to its title.
        comparisons: Question to the arm that others are compared with, and these.
    """
    seeds = ", ".join(results)
    command = f"`python -m benchmarks.studies.harder_world --world {world}`"
    lines = [f"# The harder world ({world}), seed by seed", "", f"{ABOUT} {command}, seeds {seeds}.", ""]
    lines += ["## The supervised model while the image is hidden", "", *prior_table(results), "", "## Every arm", ""]
    lines += [*arm_table(results, titles), ""]
    for question, (reference, others) in comparisons.items():
        found = [line for other in others for line in difference_lines(results, other, reference, titles)]
        if found:
            lines += [
                f"## {question}",
                "",
                f"Differences from: {titles[reference]}.",
                "",
                *difference_head(),
                *found,
                "",
            ]
    return "\n".join(lines)


def prior_table(results: Mapping[str, Any]) -> list[str]:
    """What each seed's model says while it sees nothing."""
    head = ["seed", "whole sentences", "anchors whose partner is named", "usual attributes"]
    head += ["perplexity, hidden", "perplexity, seen"]
    lines = table_head(head)
    for seed, found in results.items():
        prior = found["prior"]
        shares = [percent(prior.get(name)) for name in ("fluent", "usual_partners", "usual_attributes")]
        perplexities = [f"{prior[name]:.2f}" for name in ("perplexity_hidden", "perplexity_seen")]
        lines.append(row([seed, *shares, *perplexities]))
    return lines


def arm_table(results: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """Every arm and seed, and the mean over its seeds."""
    names = [*SHOWN.values(), "untrue, greedy", "recall, greedy", "CHAIR_i, balanced", "POPE adversarial"]
    lines = table_head(["arm", "seed", "cell", "cells", *names])
    for arm in titles:
        rows = []
        for seed, found in results.items():
            each = {"values": found[arm]} if arm in found else found["arms"].get(arm)
            if each is None:
                continue
            numbers = shown(each["values"])
            rows.append(numbers)
            cell = ", ".join(f"{number:g}" for number in each.get("cell", ()))
            lines.append(row([titles[arm], seed, cell, str(each.get("cells", "")), *map(percent, numbers)]))
        if len(rows) > 1:
            means = [mean(column) if None not in column else None for column in zip(*rows, strict=True)]
            lines.append(row([titles[arm], "mean", "", "", *map(percent, means)]))
    return lines


def shown(values: Mapping[str, Mapping[str, float]]) -> list[float | None]:
    """The numbers of one arm in the order of the table."""
    sampled, greedy = values["adv, sampled"], values["adv, greedy"]
    numbers = [sampled.get(name) for name in SHOWN]
    numbers += [greedy.get("untrue"), greedy.get("recall"), values["balanced, sampled"].get("chair_i")]
    return [*numbers, values.get("questions", {}).get("pope")]


def difference_head() -> list[str]:
    return table_head(["arm", "seed", *(SHOWN[name] for name in COMPARED)])


def difference_lines(results: Mapping[str, Any], other: str, reference: str, titles: Mapping[str, str]) -> list[str]:
    """Each seed's difference with its interval over scenes; the mean with its interval over seeds."""
    found = {seed: each["differences"].get(f"{other} - {reference}") for seed, each in results.items()}
    found = {seed: each for seed, each in found.items() if each is not None}
    lines = []
    for seed, each in found.items():
        cells = [interval(*each[name]) if name in each else "-" for name in COMPARED]
        lines.append(row([titles[other], seed, *cells]))
    if len(found) > 1:
        columns = [[each[name][0] for each in found.values() if name in each] for name in COMPARED]
        cells = [over_seeds(column) if len(column) == len(found) else "-" for column in columns]
        lines.append(row([titles[other], f"mean of {len(found)}", *cells]))
    return lines


def over_seeds(values: Sequence[float]) -> str:
    """The mean of paired differences, with Student's 95 % interval."""
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * stdev(values) / math.sqrt(len(values))
    return f"**{interval(mean(values), mean(values) - half, mean(values) + half)}**"


def interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def table_head(names: Sequence[str]) -> list[str]:
    return [row(names), f"|{'---|' * len(names)}"]


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
