"""Conversations in LLaVA's format with any number of images and turns, and supervised rows of them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Image, List, Value

from trl_vlm.data.converters.records import (
    IMAGE_MENTION,
    MESSAGES,
    BadRecord,
    Record,
    Row,
    clean_reply,
    clean_text,
    spoken_turns,
)

TURNS = ("each", "last", "all")
PLACES = ("start", "parts")

PARTS = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
SUPERVISED_COLUMNS = {"images": List(Image()), "prompt": MESSAGES, "completion": MESSAGES, "messages": MESSAGES}
LEADING_MENTIONS = re.compile(rf"(?:\s*{IMAGE_MENTION})+")

Message = dict[str, Any]


def images_of(record: Record) -> list[object]:
    """The images of a record's `image` or `images`: one, a list of them, or none."""
    value = record.get("images") if record.get("image") is None else record["image"]
    if isinstance(value, Mapping):
        return [value] if value.get("bytes") or value.get("path") else []
    if value is None or (isinstance(value, str | bytes) and not value):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def dialogue(conversation: object, images: int, places: str = "start", what: str = "conversations") -> list[Message]:
    """LLaVA's turns as messages, with all images at their places.

    Without any `<image>` in the text, the images are at the start of the first question.

    Args:
        conversation: `[{"from": "human" | "gpt", "value": ...}, ...]`, or messages with `role` and `content`.
        images: How many images the record has.
        places: "start" gives contents that are text: a single image must be mentioned in the first question, where
            it then stands first, as in LLaVA's own code; several must be mentioned at its beginning. "parts" gives
            contents that are lists of parts, each image where it is mentioned.
        what: What the conversation is called in errors.

    Raises:
        BadRecord: Not as many images are mentioned as there are, or they are mentioned elsewhere; speakers that do
            not take turns; an empty turn.
    """
    if places not in PLACES:
        raise ValueError(f"`image_places` is {places!r}; it must be one of {', '.join(PLACES)}.")
    turns = spoken_turns(conversation, what)
    for role, text in turns:
        if role != "user":
            clean_reply(text, f"turn of {what}")
    mentioned = sum(text.count(IMAGE_MENTION) for _, text in turns)
    if mentioned and mentioned != images:
        raise BadRecord("placeholders and images differ", f"{mentioned} x {IMAGE_MENTION}, and {images} images")
    first = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise BadRecord(f"{what} holds no question")
    if places == "parts":
        added = 0 if mentioned else images
        return [_in_parts(role, text, added if place == first else 0) for place, (role, text) in enumerate(turns)]
    _check_start(turns[first][1], mentioned)
    return [_as_text(role, text, what) for role, text in turns]


def _check_start(question: str, mentioned: int) -> None:
    """Refuses images whose place is lost when they are all put before the first question."""
    leading = LEADING_MENTIONS.match(question)
    at_start = leading.group().count(IMAGE_MENTION) if leading else 0
    if question.count(IMAGE_MENTION) != mentioned or (mentioned > 1 and at_start != mentioned):
        raise BadRecord(
            "images are not at the start",
            f'{mentioned} images, and the first question is {question[:60]!r}; `image_places="parts"` keeps places',
        )


def _as_text(role: str, text: str, what: str) -> Message:
    name = "question" if role == "user" else f"turn of {what}"
    return {"role": role, "content": clean_text(text.replace(IMAGE_MENTION, "") if role == "user" else text, name)}


def _in_parts(role: str, text: str, images: int) -> Message:
    """A message of parts: so many images, then the text with an image wherever it is mentioned."""
    pieces = text.split(IMAGE_MENTION)
    if not any(piece.strip() for piece in pieces):
        raise BadRecord("empty question")
    parts: list[dict[str, Any]] = [{"type": "image", "text": None}] * images
    for place, piece in enumerate(pieces):
        parts += [{"type": "image", "text": None}] if place else []
        parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return {"role": role, "content": parts}


def supervised_rows(
    images: Sequence[object],
    messages: Sequence[Message],
    *,
    turns: str = "each",
    max_turns: int | None = None,
    **extra: object,
) -> list[Row]:
    """The supervised rows of one dialogue.

    Args:
        images: Its images.
        messages: Its messages, which end on a reply.
        turns: "each" makes a row of every reply after its history, which any trainer reads rightly; "last" one row,
            of the last reply; "all" one row of `messages`, for `assistant_only_loss`.
        max_turns: How many replies are kept of it, from the first on; all if None.
        extra: Further columns.

    Raises:
        BadRecord: A dialogue that does not begin with a question, or does not end on a reply.
        ValueError: An unknown `turns`.
    """
    if turns not in TURNS:
        raise ValueError(f"`turns` is {turns!r}; it must be one of {', '.join(TURNS)}.")
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant" or "user" not in roles[: roles.index("assistant")]:
        raise BadRecord("conversations is not of questions and their replies", f"speakers are {roles}")
    ends = [place for place, role in enumerate(roles, start=1) if role == "assistant"][:max_turns]
    row = {"images": list(images), **extra}
    if turns == "all":
        return [{**row, "messages": list(messages[: ends[-1]])}]
    return [
        {**row, "prompt": list(messages[: end - 1]), "completion": list(messages[end - 1 : end])}
        for end in (ends if turns == "each" else ends[-1:])
    ]
