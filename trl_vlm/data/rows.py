"""The row contract: which columns a dataset may have, and errors that name the row and the column.

Images are not decoded here; that happens where a batch is made (`trl_vlm.data.images`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from trl_vlm.data.errors import RowError, RowTypeError
from trl_vlm.data.messages import message_text

Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
ROW_NAME = "row_name"  # the column that carries what a row is called in errors
IMAGE_COLUMNS = ("images", "image")
MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion")
REPLY_COLUMNS = ("chosen", "rejected", "completion")


def row_images(row: Row, name: str) -> list[Any]:
    """Returns the row's images, not decoded: the `images` list, or the one `image`; [] if it has none.

    Args:
        row: A row of a dataset.
        name: What the row is called in errors, for example "row 12".

    Raises:
        ValueError: The row has both columns filled.
        TypeError: `images` is no list.
    """
    images, image = row.get("images"), row.get("image")
    if images is not None and image is not None:
        raise RowError(f"{name}: both 'images' and 'image' are filled. Keep the list in 'images' and drop 'image'.")
    if image is not None:
        return [image]
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        raise RowTypeError(
            f"{name}: 'images' is a {type(images).__name__}. It must be a list, [] for a row without; "
            "a single image goes into the column 'image'."
        )
    return list(images)


def check_row(row: Row, required: Iterable[str], *, name: str) -> None:
    """Checks one row: required columns, messages, replies that say something, facts, margin.

    Raises:
        ValueError, TypeError: Naming the row and the column.
    """
    for column in required:
        if row.get(column) is None:
            raise RowError(f"{name}: the column {column!r} is missing or None. It has {sorted(row)}.")
    for column in MESSAGE_COLUMNS:
        if row.get(column) is not None:
            _check_messages(row[column], f"{name}, column {column!r}")
    for column in REPLY_COLUMNS:
        if row.get(column) is not None and not message_text(row[column][-1]).strip():
            raise RowError(f"{name}, column {column!r}: the reply is empty. Drop the row, or fill the reply in.")
    _check_facts(row.get("facts"), name)
    margin = row.get("margin")
    if margin is not None and not math.isfinite(margin):
        raise RowError(f"{name}, column 'margin': {margin} is not a finite number. Use 0.0 for no margin.")


def _check_messages(messages: Any, name: str) -> None:
    if isinstance(messages, str) or not isinstance(messages, list | tuple):
        raise RowTypeError(
            f"{name}: it is a {type(messages).__name__}. It must be a list of messages, "
            'for example [{"role": "user", "content": "What is this?"}].'
        )
    if not messages:
        raise RowError(f"{name}: the list of messages is empty. It needs at least one message.")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise RowError(
                f"{name}: {message!r} is not a message. It needs a 'role' ({', '.join(ROLES)}) and 'content'."
            )
        if not isinstance(message.get("content"), str | list | tuple):
            raise RowTypeError(
                f"{name}: the content of the {message['role']} turn is a {type(message.get('content')).__name__}. "
                "It must be a string, or a list of parts such as {'type': 'text', 'text': ...}."
            )


def _check_facts(facts: Any, name: str) -> None:
    if facts is None:
        return
    if isinstance(facts, str) or not isinstance(facts, list | tuple):
        raise RowTypeError(f"{name}, column 'facts': it is a {type(facts).__name__}. It must be a list of strings.")
    for fact in facts:
        if not isinstance(fact, str) or not fact.strip():
            raise RowError(
                f"{name}, column 'facts': {fact!r} is not a fact. Each one is a string that says something."
            )
