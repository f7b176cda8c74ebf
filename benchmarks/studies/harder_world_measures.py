"""What `harder_world.py` measures: fractions of sums over fresh scenes, so that differences can be paired."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_vlm.evaluation.benchmark import Ratio, Record, Scores
from trl_vlm.evaluation.replies import replies_in_batches
from trl_vlm.evaluation.statistics import differences
from trl_vlm.evaluation.tasks import read_tasks
from trl_vlm.pairs import Policy
from trl_vlm.testbed.benchmark import Scenes, scenes_benchmarks
from trl_vlm.testbed.evaluate import generate_captions
from trl_vlm.testbed.oracle import count_attributes, count_reply
from trl_vlm.testbed.sentences import statements
from trl_vlm.testbed.world import Split, World


def fraction(measured: Mapping[str, Any], name: str) -> float:
    return Ratio(*measured["adv, sampled"][name]).value


def values(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The number of each fraction; those of which nothing was told are left out."""
    return {
        place: {name: Ratio(*terms).value for name, terms in found.items() if sum(terms[1])}
        for place, found in measured.items()
    }


def paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[float]]:
    """Differences on the same scenes, the second arm minus the first, each with its 95 % interval over scenes."""
    one, two = (Scores({n: Ratio(*terms) for n, terms in each["adv, sampled"].items()}) for each in (first, second))
    scenes = [str(number) for number in range(len(first["adv, sampled"]["recall"][0]))]
    found = differences(one, two, scenes)
    return {name: [each.value, each.low, each.high] for name, each in found.items() if each.value == each.value}


def captions(policy: Policy, world: World, split: Split, count: int, seed: int, sample: bool) -> dict[str, Any]:
    """What captions of fresh scenes say: for each number, the terms above and below its fraction."""
    pictures = world.pictures(count, seed, split)
    images = [picture.image for picture in pictures]
    limit = world.max_caption_tokens
    replies = generate_captions(*policy, images, sample=sample, seed=seed, max_new_tokens=limit)
    truths = [picture.scene.statements for picture in pictures]
    counts = [count_reply(reply, truth) for reply, truth in zip(replies, truths, strict=True)]
    told = [count_attributes(reply, truth) for reply, truth in zip(replies, truths, strict=True)]
    said = [statements(reply) for reply in replies]
    untrue = [
        sum(each is None or truth.get(each.kind) != each for each in sentences)
        for sentences, truth in zip(said, truths, strict=True)
    ]
    mentions, sentences = [each.mentions for each in counts], [len(each) for each in said]
    return {
        "untrue": [untrue, sentences],
        "chair_i": [[each.hallucinated_mentions for each in counts], mentions],
        "attributes": [[each.wrong for each in told], [each.told for each in told]],
        "recall": [[each.correct for each in counts], [each.present for each in counts]],
        "repeats": [[each.repeats for each in counts], mentions],
        "broken": [[each.broken for each in told], sentences],
        "length": [[each.words for each in counts], [1] * len(counts)],
    }


def answers(policy: Policy, world: World, count: int, seed: int) -> dict[str, Any]:
    """Accuracy of answers to adversarial questions."""
    _, _, benchmark = scenes_benchmarks(Scenes(world, count, seed, splits=("adv",)))
    (task,) = read_tasks([benchmark], Path())
    asked = [question for question in task.questions if question.truth["category"] == "adversarial"]
    batches = [asked[start : start + 64] for start in range(0, len(asked), 64)]
    replies = [reply for made in replies_in_batches(policy, task, batches) for reply in made]
    records = [Record(q.id, q.group, q.text, *reply[:1], q.truth) for q, reply in zip(asked, replies, strict=True)]
    scores: Scores = benchmark.score(records)
    return {"pope": [list(part) for part in scores.ratios["adv_pope_adversarial_accuracy"][:2]]}
