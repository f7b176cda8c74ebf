"""The language of the testbed: one sentence per object, plain or with the object's size, color and place."""

import re
from typing import NamedTuple

_NOUNS = (
    "table chair cup plate dog ball tree bird car sign bed lamp desk phone boat kite fork knife cat sofa horse fence "
    "clock book bowl spoon bench bike train track oven fridge sheep grass glove bat"
)
NOUNS = tuple(_NOUNS.split())
SENTENCES = ("there is a {} .", "i see a {} .")
SIZES = ("small", "large")
COLORS = {"red": 0.0, "yellow": 1 / 6, "green": 1 / 3, "blue": 2 / 3}  # with their hues
PLACES = ("on the left", "in the middle", "on the right")  # the three columns of a picture


class Statement(NamedTuple):
    """What a sentence says of one object; without attributes all but its kind are empty."""

    kind: str
    size: str = ""
    color: str = ""
    place: str = ""

    @property
    def phrase(self) -> str:
        """What stands in the place of {} in one of `SENTENCES`."""
        return " ".join(word for word in (self.size, self.color, self.kind, self.place) if word)


def _either(words: tuple[str, ...]) -> str:
    return f"({'|'.join(words)})"


_PLAIN = re.compile(f"(?:there is|i see) a {_either(NOUNS)}")
_FULL = re.compile(
    f"(?:there is|i see) a {_either(SIZES)} {_either(tuple(COLORS))} {_either(NOUNS)} {_either(PLACES)}"
)


def read_sentence(sentence: str) -> Statement | None:
    """What a sentence says; None if it is broken, such as "there is a". Its full stop may be missing.

    A sentence with some attributes and without others is broken too: nobody speaks so in this world.
    """
    words = sentence.removesuffix(".").strip()
    if plain := _PLAIN.fullmatch(words):
        return Statement(plain[1])
    if full := _FULL.fullmatch(words):
        size, color, kind, place = full.groups()
        return Statement(kind, size, color, place)
    return None


def read_phrase(phrase: str) -> Statement:
    """The statement that a phrase tells (`Statement.phrase`); a noun alone tells of a kind and nothing else.

    Raises:
        ValueError: It tells no statement.
    """
    statement = read_sentence(SENTENCES[0].format(phrase))
    if statement is None:
        raise ValueError(f"{phrase!r} tells no statement: use a noun, or size, color, noun and place.")
    return statement


def statements(reply: str) -> list[Statement | None]:
    """What each sentence of a reply says, broken ones as None."""
    return [read_sentence(sentence) for sentence in reply.split(" .") if sentence.strip()]
