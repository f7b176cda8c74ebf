"""Scores replies exactly: the testbed knows what every picture shows, so no judge is needed.

`find_objects` is an argument of `trl_vlm.evaluation.chair`; the truths are `scene.kinds`, or the `objects` of a row.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trl_vlm.testbed.sentences import NOUNS, Statement, read_phrase, statements

_NOUNS = frozenset(NOUNS)


@dataclass(frozen=True)
class ReplyCounts:
    """The scores of one reply for one scene.

    Attributes:
        correct: Distinct kinds that are named and present.
        hallucinated: Distinct kinds that are named and absent.
        mentions: All mentions, repeats included.
        hallucinated_mentions: Mentions of absent kinds, repeats included.
        repeats: Mentions of a kind that the reply had named before.
        present: Kinds that the scene shows.
        sentences: Sentences, an unfinished last one included.
        words: Words and full stops.
    """

    correct: int
    hallucinated: int
    mentions: int
    hallucinated_mentions: int
    repeats: int
    present: int
    sentences: int
    words: int


def find_objects(reply: str) -> list[str]:
    """The kinds a reply names, in order, repeats included. A noun of no kind of this world counts too."""
    return [word for word in reply.split() if word in _NOUNS]


def count_reply(reply: str, truth: Collection[str]) -> ReplyCounts:
    """Compares a reply with the kinds that are present."""
    mentions = find_objects(reply)
    distinct = set(mentions)
    words = reply.split()
    return ReplyCounts(
        correct=len(distinct & set(truth)),
        hallucinated=len(distinct - set(truth)),
        mentions=len(mentions),
        hallucinated_mentions=sum(kind not in truth for kind in mentions),
        repeats=len(mentions) - len(distinct),
        present=len(set(truth)),
        sentences=words.count(".") + (bool(words) and words[-1] != "."),
        words=len(words),
    )


class AttributeCounts(NamedTuple):
    """The attributes that a reply tells of objects that are there, repeats included.

    told: Sizes, colors and places.
    wrong: Those that are not true.
    broken: Sentences that cannot be read.
    """

    told: int
    wrong: int
    broken: int


def count_attributes(reply: str, truth: Mapping[str, Statement]) -> AttributeCounts:
    """Compares what a reply says with what is true of each kind that is present (`scene.statements`)."""
    said = statements(reply)
    pairs = [(each[1:], truth[each.kind][1:]) for each in said if each is not None and each.kind in truth]
    told = [(value, true) for values, trues in pairs for value, true in zip(values, trues, strict=True) if value]
    return AttributeCounts(len(told), sum(value != true for value, true in told), said.count(None))


def right_and_wrong(reply: str, truth: Mapping[str, Statement]) -> tuple[int, int]:
    """How many distinct things a reply says that are true, and how many that are not.

    Things are kinds; where the truth tells attributes, they are whole statements: one of which anything is wrong is
    untrue, and so is each broken sentence.

    Args:
        reply: The reply.
        truth: Kind to what is true of it (`scene.statements`).
    """
    if not any(each.size for each in truth.values()):
        counts = count_reply(reply, truth)
        return counts.correct, counts.hallucinated
    told = statements(reply)
    said = {each for each in told if each is not None}
    right = sum(truth.get(each.kind) == each for each in said)
    return right, len(said) - right + told.count(None)


def object_overlap(texts: Sequence[str], others: Sequence[str]) -> list[float]:
    """The similarity of two replies: the fraction of named objects that both name. The testbed's gate of BDHS.

    1 for the same objects in any order, also where neither names one; 0 for none in common.
    """
    overlaps = []
    for text, other in zip(texts, others, strict=True):
        named, others_named = set(find_objects(text)), set(find_objects(other))
        either = named | others_named
        overlaps.append(len(named & others_named) / len(either) if either else 1.0)
    return overlaps


def truth_reward(
    prompts: Sequence[Any],
    completions: Sequence[Sequence[dict[str, str]]],
    objects: Sequence[list[str]],
    statements: Sequence[list[str]] | None = None,
    **_: Any,
) -> list[float]:
    """A TRL reward function that knows the truth: distinct right things - 2 wrong ones - 0.5 repeated kinds.

    What is right and wrong says `right_and_wrong`. In contrast to the labeler of `datasets.worth`, it does not reward
    length.

    Args:
        prompts: Not read.
        completions: The replies.
        objects: The kinds that each picture shows.
        statements: Where sentences have attributes, what is true of each, such as "small red cup on the left".
    """
    told = [[Statement(kind) for kind in kinds] for kinds in objects]
    if statements is not None:
        told = [[read_phrase(phrase) for phrase in phrases] for phrases in statements]
    truths = [{each.kind: each for each in scene} for scene in told]
    rewards = []
    for reply, truth in zip(completions, truths, strict=True):
        text = reply[-1]["content"]
        right, wrong = right_and_wrong(text, truth)
        rewards.append(right - 2.0 * wrong - 0.5 * count_reply(text, truth).repeats)
    return rewards
