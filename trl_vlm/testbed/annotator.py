"""Who corrects a model's replies: an oracle, or an annotator as real ones are, who overlooks much and re-words."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trl_vlm.testbed.oracle import find_objects
from trl_vlm.testbed.sentences import NOUNS, SENTENCES, Statement

_OPENINGS = [sentence.split("{}")[0].split() for sentence in SENTENCES]
Span = tuple[int, int]


class Correction(NamedTuple):
    """A reply corrected, and the characters that were corrected: (start, end), end exclusive.

    chosen: The corrected reply.
    chosen_spans: What was put in, in `chosen`.
    rejected_spans: What was wrong, in the reply.
    """

    chosen: str
    chosen_spans: list[Span]
    rejected_spans: list[Span]


@dataclass(frozen=True)
class Annotator:
    """Corrects replies as RLHF-V's annotators do: wrong segments are rewritten, everything else stays.

    A kind is wrong if it is absent or was named before, for no picture shows one twice. It is replaced by the next
    present kind that the reply leaves out; if there is none, the sentence is removed. So is a sentence that names
    nothing. Where sentences tell attributes, wrong ones are replaced by the true ones.

    Args:
        noticed: How many wrong sentences of a reply it notices, chosen at random; None is all, the oracle.
        reworded: With which probability it re-words a sentence that it does not correct to "there is a ...".
    """

    noticed: int | None = None
    reworded: float = 0.0

    def __post_init__(self):
        if self.noticed is not None and self.noticed < 1:
            raise ValueError(f"noticed={self.noticed}: an annotator notices 1 error or more, or None for all.")
        if not 0.0 <= self.reworded <= 1.0:
            raise ValueError(f"reworded={self.reworded} is a probability: give a number from 0 to 1.")

    def __call__(self, reply: str, truth: Sequence[Statement], rng: np.random.Generator) -> Correction | None:
        """The correction of a reply; None if it has no error, or if nothing is left of it.

        Args:
            reply: Sentences that end in " .".
            truth: What is true of the picture, in the order in which it replaces what is wrong.
            rng: Draws what is noticed and re-worded; the oracle draws nothing.
        """
        sentences = reply.split(" .")  # behind the last full stop nothing, or an unfinished sentence
        old = [sentence.split() for sentence in sentences]
        looked_at: Collection[int] = range(len(old))
        new = _corrected(old, truth, looked_at)
        wrong = [place for place, words in enumerate(old) if words != new[place] and find_objects(" ".join(words))]
        if not wrong:
            return None
        if self.noticed is not None:
            looked_at = rng.choice(wrong, min(self.noticed, len(wrong)), replace=False).tolist()
            new = _corrected(old, truth, looked_at)
        kept: list[str] = []
        chosen_spans: list[Span] = []
        rejected_spans: list[Span] = []
        start, start_in_chosen = 0, 0
        for place, (sentence, before, after) in enumerate(zip(sentences, old, new, strict=True)):
            changed, changed_to = _changed(before, after)
            rejected_spans += _spans(sentence, changed, start)
            start += len(sentence) + len(" .")
            if not after:
                continue
            text = " ".join(after if changed else self._in_own_words(after, rng))
            text += " ." if place in looked_at or place < len(old) - 1 else ""
            chosen_spans += _spans(text, changed_to, start_in_chosen)
            start_in_chosen += len(text) + 1
            kept.append(text)
        return Correction(" ".join(kept), chosen_spans, rejected_spans) if kept else None

    def _in_own_words(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """A sentence that needs no correction, perhaps with the annotator's opening in the place of another."""
        own, *others = _OPENINGS
        if self.reworded and words[: len(own)] in others and rng.random() < self.reworded:
            return own + words[len(own) :]
        return words


def _corrected(
    sentences: Sequence[list[str]], truth: Sequence[Statement], looked_at: Collection[int]
) -> list[list[str]]:
    """The words of each sentence after correction, none where it is removed; only `looked_at` are corrected."""
    true = {statement.kind: statement for statement in truth}
    named = {word for words in sentences for word in words}
    missing = [kind for kind in true if kind not in named]
    said: set[str] = set()
    corrected = []
    for place, words in enumerate(sentences):
        words = _right(words, true, said, missing) if place in looked_at else words
        said |= set(find_objects(" ".join(words)))
        corrected.append(words)
    return corrected


def _right(words: Sequence[str], true: Mapping[str, Statement], said: set[str], missing: list[str]) -> list[str]:
    """A sentence corrected, or nothing. Takes what it needs from `missing`."""
    words = list(words)
    for place, word in enumerate(words):
        if word in NOUNS and (word not in true or word in said) and missing:
            words[place] = missing.pop(0)
    named = find_objects(" ".join(words))
    if not named or not set(named) <= true.keys() - said:
        return []
    if not true[named[0]].size:
        return words
    opening = next((opening for opening in _OPENINGS if words[: len(opening)] == opening), _OPENINGS[0])
    return [*opening, *true[named[0]].phrase.split()]


def _changed(before: Sequence[str], after: Sequence[str]) -> tuple[list[int], list[int]]:
    """The places of the words that a correction replaces, and of those that it puts there."""
    if len(before) != len(after):
        return list(range(len(before))), list(range(len(after)))
    places = [place for place, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    return places, places


def _spans(text: str, words: Collection[int], start: int) -> list[Span]:
    """The characters of words of a text that begins at `start`."""
    found = enumerate(re.finditer(r"\S+", text))
    return [(start + word.start(), start + word.end()) for place, word in found if place in words]
