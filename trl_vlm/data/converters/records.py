"""What every converter needs: named faults, turns of a conversation, and rows of the row contract."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Image, List, Value

from trl_vlm.data.errors import BadRecord
from trl_vlm.data.io.image_files import present_image

IMAGE_MENTION = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Record = Mapping[str, Any]
Row = dict[str, Any]
Message = dict[str, Any]

MESSAGES = List({"role": Value("string"), "content": Value("string")})
PROMPT_COLUMNS = {"images": List(Image()), "prompt": MESSAGES}
PREFERENCE_COLUMNS = {**PROMPT_COLUMNS, "chosen": MESSAGES, "rejected": MESSAGES}


class MissingColumns(BadRecord):
    """A record without the columns that its converter reads: another dataset, or another revision of it."""


@dataclass
class Converted:
    """The rows of one record, and what its converter left out on purpose, by reason (ties, unusable ratings)."""

    rows: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)


def need(record: Record, columns: Iterable[str], remedy: str = "") -> None:
    """Raises `MissingColumns`, naming the columns found and those needed, unless `record` has all `columns`."""
    columns = list(columns)
    missing = [column for column in columns if column not in record]
    if missing:
        raise MissingColumns(
            "missing columns",
            f"{missing}. Found the columns {sorted(map(str, record))}; needed are {columns}. "
            + (remedy or "Is this the dataset, the file and the revision that the converter is for?"),
        )


def clean_text(value: object, what: str) -> str:
    """`value` without white space around it; raises `BadRecord` where that is no text, or none is left."""
    if not isinstance(value, str):
        raise BadRecord(f"{what} is not text", f"got {type(value).__name__} {str(value)[:60]!r}")
    text = value.strip()
    if not text:
        raise BadRecord(f"empty {what}")
    return text


def list_of_texts(values: object, what: str) -> list[str]:
    """The texts of a list without white space around them; raises `BadRecord` for anything else."""
    if not isinstance(values, list | tuple):
        raise BadRecord(f"{what}s are not a list", f"got {type(values).__name__} {str(values)[:60]!r}")
    return [clean_text(value, what) for value in values]


def clean_reply(value: object, what: str = "reply") -> str:
    """A reply's text: not empty, and without a literal image placeholder, which would be read as an image."""
    text = clean_text(value, what)
    if IMAGE_MENTION in text:
        raise BadRecord(f"{what} mentions {IMAGE_MENTION}", repr(text[:60]))
    return text


def question_text(value: object) -> str:
    """A question's text without its image placeholder: the row contract puts the image at the first user turn.

    Raises `BadRecord` for a second placeholder, because these datasets hold one image a record.
    """
    text = clean_text(value, "question")
    if text.count(IMAGE_MENTION) > 1:
        raise BadRecord("more image placeholders than images", f"{text.count(IMAGE_MENTION)} in {text[:60]!r}")
    return clean_text(text.replace(IMAGE_MENTION, ""), "question")


def user_turn(text: str) -> list[Message]:
    """One user message."""
    return [{"role": "user", "content": text}]


def assistant_turn(text: str) -> list[Message]:
    """One assistant message."""
    return [{"role": "assistant", "content": text}]


def turns(conversation: object, what: str = "conversations") -> list[Message]:
    """LLaVA's `[{"from": "human" | "gpt", "value": ...}, ...]` as messages, image placeholder taken out.

    Messages that are already `{"role", "content"}` pass as well. Raises `BadRecord` for an unknown speaker, for
    speakers that do not take turns, for an empty turn, and for a placeholder anywhere but in the first user turn:
    only there can the row contract put the image.
    """
    messages: list[Message] = []
    for role, text in spoken_turns(conversation, what):
        is_first_question = role == "user" and not any(message["role"] == "user" for message in messages)
        text = question_text(text) if is_first_question else clean_reply(text, f"turn of {what}")
        messages.append({"role": role, "content": text})
    return messages


def spoken_turns(conversation: object, what: str = "conversations") -> list[tuple[str, str]]:
    """The role and the text of each of LLaVA's turns, or of messages; raises `BadRecord` as `turns` does."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise BadRecord(f"{what} holds no turns", f"got {str(conversation)[:60]!r}")
    found: list[tuple[str, str]] = []
    for turn in conversation:
        if not isinstance(turn, Mapping):
            raise BadRecord(f"{what} holds a turn without a speaker", f"got {str(turn)[:60]!r}")
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise BadRecord(f"{what} has an unknown speaker", f"{speaker!r}; known are {sorted(ROLES)}")
        role, value = ROLES[speaker], turn.get("value", turn.get("content"))
        if found and found[-1][0] == role:
            raise BadRecord(f"{what} has one speaker twice in a row", f"turns {len(found) - 1} and {len(found)}")
        found.append((role, clean_text(value, "question" if role == "user" else f"turn of {what}")))
    return found


def prompt_and_last_reply(messages: Sequence[Message], what: str = "conversations") -> tuple[list[Message], str]:
    """All turns but the last, and the last one's text; raises `BadRecord` unless a user asks and an assistant ends."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        roles = [message["role"] for message in messages]
        raise BadRecord(f"{what} does not end on a question and its reply", f"speakers are {roles}")
    return list(messages[:-1]), messages[-1]["content"]


def prompt_row(image: object, prompt: list[Message], **extra: object) -> Row:
    """A row with one image and a prompt, and the columns in `extra`; raises `BadRecord` without an image."""
    return {"images": [present_image(image)], "prompt": prompt, **extra}


def preference_row(image: object, prompt: list[Message], chosen: object, rejected: object, **extra: object) -> Row:
    """A preference row; raises `BadRecord` for an empty reply, for equal replies, and without an image."""
    return preference_row_of([present_image(image)], prompt, chosen, rejected, **extra)


def preference_row_of(
    images: list[object], prompt: list[Message], chosen: object, rejected: object, **extra: object
) -> Row:
    """A preference row with any number of images; raises `BadRecord` for an empty reply and for equal replies."""
    chosen, rejected = clean_reply(chosen, "chosen reply"), clean_reply(rejected, "rejected reply")
    if chosen == rejected:
        raise BadRecord("chosen and rejected are the same", repr(chosen[:60]))
    row = {"images": images, "prompt": prompt}
    return {**row, "chosen": assistant_turn(chosen), "rejected": assistant_turn(rejected), **extra}


def drawn_one(values: Sequence[str], name: str) -> str:
    """One of the values, the same for a name wherever it is asked for."""
    return values[int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:8]) % len(values)]


def read_json(file: Path) -> Any:
    """What a file of JSON holds; raises `ValueError` where it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}). Is the download complete?") from error


def joined_facts(facts: Mapping[str, Sequence[str]], image: object, prefix: str = "") -> list[str]:
    """The facts stored under `prefix` and the image's name; raises `BadRecord` where there are none."""
    path = present_image(image)
    key = prefix + PurePosixPath(str(path["path"] if isinstance(path, Mapping) else path)).name
    if key not in facts:
        raise BadRecord("no facts for the image", f"the facts file has no key {key!r}")
    return list_of_texts(facts[key], "fact")
