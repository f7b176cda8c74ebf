"""Scores replies exactly: the testbed knows what every picture shows, so no judge is needed."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from trl_vlm.testbed.world import NOUNS

_NOUNS = frozenset(NOUNS)


@dataclass(frozen=True)
class ReplyCounts:
    """What one reply says of one scene.

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


def caption_metrics(replies: Sequence[str], truths: Sequence[Collection[str]]) -> dict[str, float]:
    """CHAIR and what keeps it honest, in percent, over replies and the kinds that their pictures show.

    `chair_i`: hallucinated mentions per mention; `chair_u`: the same over distinct kinds of each reply (without
    repeats); `chair_s`: replies with any hallucination; `recall`: present kinds that are named, mean over replies;
    `repeats`: repeated mentions per mention; `length`: words per reply (not a percentage).
    """
    if not replies:
        raise ValueError("There is no reply to score; pass at least one reply and its truth.")
    counts = [count_reply(reply, truth) for reply, truth in zip(replies, truths, strict=True)]

    def total(name: str) -> int:
        return sum(getattr(count, name) for count in counts)

    return {
        "chair_i": 100 * total("hallucinated_mentions") / max(1, total("mentions")),
        "chair_u": 100 * total("hallucinated") / max(1, total("hallucinated") + total("correct")),
        "chair_s": 100 * sum(count.hallucinated > 0 for count in counts) / len(counts),
        "recall": 100 * sum(count.correct / max(1, count.present) for count in counts) / len(counts),
        "repeats": 100 * total("repeats") / max(1, total("mentions")),
        "length": total("words") / len(counts),
    }
