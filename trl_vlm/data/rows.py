"""What a row is, and what is wrong with it: used by trainers, pair sources and `trl-vlm check` alike.

`faults` yields everything that is wrong with a row. `check_row` raises the first fault that is more than a warning,
under the row's name. Images are not decoded here; that happens when a batch is made (`trl_vlm.data.images`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from trl_vlm.data.faults import (
    COLUMNS,
    EMPTY_QUESTION,
    EMPTY_REPLY,
    IMAGE_COLUMNS,
    IMAGE_IN_MESSAGE,
    IMAGE_PLACES,
    MALFORMED,
    MESSAGE_COLUMNS,
    MISSING,
    REPLY_COLUMNS,
    SAME_REPLY,
    SCORE_WEIGHT_COLUMNS,
    SPAN_COLUMNS,
    TWO_IMAGE_COLUMNS,
    WRONG_SPEAKER,
    WRONG_TYPE,
    Fault,
    Reading,
    column_faults,
    span_faults,
    text_faults,
)
from trl_vlm.data.messages import IMAGE_TOKENS, Conversation, content_parts, is_same_reply, place_fault

Row: TypeAlias = Mapping[str, Any]

REJECTED_IMAGES = "rejected_images"  # the images under which the chosen reply is to be less likely
ROW_NAME = "row_name"  # the column that says what a row is called in errors
ALL_REPLY_COLUMNS = (*REPLY_COLUMNS, "rejected_extra")
# A pair, and what is said about it: a new pair brings its own.
PAIR_COLUMNS = ("chosen", "rejected", "rejected_extra", *SPAN_COLUMNS, *SCORE_WEIGHT_COLUMNS)
# What is said about a pair beside its two replies, and is stale once they are others.
ABOUT_PAIR_COLUMNS = ("rejected_extra", *SPAN_COLUMNS, *SCORE_WEIGHT_COLUMNS, "margin")


@dataclass(frozen=True)
class Purpose:
    """What a dataset is used for.

    Args:
        required: Columns that every row needs.
        reads: Columns that are read if they are there, beside the images; a fault in any other is a warning.
    """

    required: tuple[str, ...]
    reads: tuple[str, ...]


PURPOSES = {
    "dpo": Purpose(("prompt", "chosen", "rejected"), ("prompt", *PAIR_COLUMNS)),
    "reward": Purpose(("chosen", "rejected"), ("prompt", "chosen", "rejected", "facts", "margin")),
    "ppo": Purpose(("prompt",), ("prompt", "facts", "length_weight")),
    "sft": Purpose(("prompt", "completion"), ("prompt", "completion")),
}


def name_of(row: Row, index: int, where: str = "") -> str:
    """What a row is called in errors, and what its random draws depend on: its name, else its index.

    Args:
        row: A row of a dataset.
        index: Its index.
        where: What the index refers to, for example " of the batch".
    """
    return row.get(ROW_NAME) or f"row {index}{where}"


def supervised_conversation(row: Row) -> Conversation:
    """The whole conversation of a good supervised row: its `messages`, or its prompt and its reply."""
    return row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]


def row_images(row: Row, name: str) -> list[object]:
    """The row's images, not decoded: the `images` list, or the one `image`; [] if it has none.

    Args:
        row: A row of a dataset.
        name: What the row is called in errors, for example "row 12".

    Raises:
        RowError: The row has both columns filled, or `images` is no list.
    """
    fault = _image_column_fault(row)
    if fault is not None:
        raise fault.error(name)
    if row.get("image") is not None:
        return [row["image"]]
    return list(row.get("images") or ())


def check_row(
    row: Row,
    purpose: str,
    *,
    name: str,
    image_tokens: Iterable[str] = (),
    with_images: bool | None = None,
    passes: Sequence[str] = (),
) -> None:
    """Raises the first fault of a row that is more than a warning; see `faults`.

    Args:
        row: A row of a dataset.
        purpose: What it is for.
        name: What it is called in errors.
        image_tokens: Image placeholders in the text of this model.
        with_images: Whether rows have images; None: whether this one has a column of them.
        passes: Kinds of faults that are ignored.

    Raises:
        RowError: Naming the row and the column; a `RowTypeError` for a value of the wrong type.
    """
    for fault in faults(row, purpose, image_tokens=image_tokens, control_tokens=(), with_images=with_images):
        if not fault.is_warning and fault.kind not in passes:
            raise fault.error(name)


def check_columns(row: Row, columns: Sequence[str], *, name: str, image_tokens: Iterable[str] = ()) -> None:
    """Raises the first fault in columns of messages that must be there.

    Args:
        row: A row of a dataset.
        columns: The columns.
        name: What the row is called in errors.
        image_tokens: What stands for an image in the text of the model at hand.

    Raises:
        RowError: Naming the row and the column.
    """
    reading = Reading(True, tuple(image_tokens))
    for column in columns:
        for fault in _required_faults(row, (column,)) or column_faults(row, column, reading):
            if not fault.is_warning:
                raise fault.error(name)


def faults(
    row: Row,
    purpose: str,
    *,
    image_tokens: Iterable[str] = IMAGE_TOKENS,
    control_tokens: Iterable[str] = (),
    with_images: bool | None = None,
) -> Iterator[Fault]:
    """Everything that is wrong with a row, except what only decoding its images can show.

    Rows without a column of images go to TRL's own text trainers, which take more: plain strings, other speakers.

    Args:
        row: A row of a dataset.
        purpose: What it is for: a key of `PURPOSES`.
        image_tokens: Image placeholders in the text of the models.
        control_tokens: Further tokens with a meaning to their tokenizers; reported where a text contains them.
        with_images: Whether rows have images; None: whether this one has a column of them.
    """
    if with_images is None:
        with_images = any(column in row for column in IMAGE_COLUMNS)
    if purpose == "sft" and "messages" in row:
        yield from _conversation_faults(row, image_tokens, control_tokens, with_images)
        return
    reading = Reading(with_images, tuple(image_tokens), tuple(control_tokens))
    yield from _required_faults(row, required_columns(purpose, with_images))
    if _is_plain_text(row, purpose, with_images):
        yield from _plain_text_faults(row, purpose)
        return
    reads = PURPOSES[purpose].reads
    is_well_formed = True
    for column in COLUMNS:
        if row.get(column) is None:
            continue
        for fault in column_faults(row, column, reading):
            if column in reads:
                is_well_formed &= fault.kind not in MALFORMED
                yield fault
            else:
                yield fault._replace(is_warning=True)
    if is_well_formed:
        yield from _same_reply_faults(row, reads)
    if with_images:
        yield from _image_faults(row, purpose, is_well_formed)


def _conversation_faults(
    row: Row, image_tokens: Iterable[str], control_tokens: Iterable[str], with_images: bool
) -> Iterator[Fault]:
    """The faults of a supervised row that is a whole conversation, in `messages`."""
    images = {column: row[column] for column in IMAGE_COLUMNS if column in row}
    found = faults(
        {"prompt": row["messages"], **images},
        "ppo",
        image_tokens=image_tokens,
        control_tokens=control_tokens,
        with_images=with_images,
    )
    for fault in found:
        # A conversation that trains ends on a reply, which a prompt should not.
        if not (fault.is_warning and fault.kind in (WRONG_SPEAKER, EMPTY_QUESTION)):
            yield fault._replace(column="messages") if fault.column == "prompt" else fault


def required_columns(purpose: str, with_images: bool) -> tuple[str, ...]:
    """The columns that every row needs."""
    required = PURPOSES[purpose].required
    # From text rows TRL's DPO takes the prompt off the replies, if there is no such column.
    return required if with_images or purpose != "dpo" else tuple(c for c in required if c != "prompt")


def _required_faults(row: Row, columns: Sequence[str]) -> list[Fault]:
    reason = f"it is missing or None. The row has the columns {sorted(map(str, row))}."
    return [Fault(column, MISSING, reason) for column in columns if row.get(column) is None]


def _is_plain_text(row: Row, purpose: str, with_images: bool) -> bool:
    """Whether a row is TRL's format without messages, which every text trainer takes, and DPO also with images."""
    if with_images and purpose != "dpo":
        return False
    return all(isinstance(row.get(column), str) for column in required_columns(purpose, with_images))


def _plain_text_faults(row: Row, purpose: str) -> Iterator[Fault]:
    for column in MESSAGE_COLUMNS:
        text = row.get(column)
        if column not in PURPOSES[purpose].reads or not isinstance(text, str):
            continue
        if column in REPLY_COLUMNS and not text.strip():
            yield Fault(column, EMPTY_REPLY, "the reply is empty. Drop the row, or fill the reply in.")
        yield from text_faults(text, column, "the text", Reading(False))
    for column in SPAN_COLUMNS:
        if purpose == "dpo" and row.get(column) is not None:
            yield from span_faults(row, column)
    for column in SCORE_WEIGHT_COLUMNS:
        if purpose == "dpo" and row.get(column) is not None:
            yield from column_faults(row, column, Reading(False))
    yield from _same_reply_faults(row, PURPOSES[purpose].reads)


def _same_reply_faults(row: Row, reads: Sequence[str]) -> Iterator[Fault]:
    """Warnings of rejected replies, well-formed ones, that say the same as the chosen one."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "rejected" not in reads or chosen is None or rejected is None:
        return
    reason = "it says the same as 'chosen'. Drop the row: the model cannot learn from such a pair."
    if is_same_reply(chosen, rejected):
        yield Fault("rejected", SAME_REPLY, reason, is_warning=True)
    for number, reply in enumerate(row.get("rejected_extra") or () if "rejected_extra" in reads else ()):
        if is_same_reply(chosen, reply):
            yield Fault("rejected_extra", SAME_REPLY, f"reply {number}: {reason}", is_warning=True)


# Images


def _image_column_fault(row: Row) -> Fault | None:
    images, image = row.get("images"), row.get("image")
    if images is not None and image is not None:
        reason = "both 'images' and 'image' are filled. Keep the list in 'images' and drop 'image'."
        return Fault("images", TWO_IMAGE_COLUMNS, reason)
    if image is None and images is not None and not isinstance(images, list | tuple):
        return Fault(
            "images",
            WRONG_TYPE,
            f"'images' is a {type(images).__name__}. It must be a list, [] for a row without; "
            "a single image goes into the column 'image'.",
        )
    return None


def _image_faults(row: Row, purpose: str, is_well_formed: bool) -> Iterator[Fault]:
    """Faults of the image columns, and of their placeholders in the messages."""
    if not any(column in row for column in IMAGE_COLUMNS):
        return  # left out of the check
    fault = _image_column_fault(row)
    if fault is not None:
        yield fault
        return
    column = "images" if row.get("image") is None else "image"
    conversations = [row["prompt"]] if row.get("prompt") is not None else _implicit_prompts(row, purpose)
    for conversation in conversations if is_well_formed else ():
        if purpose != "ppo" and any(part.get("image") is not None for part in content_parts(conversation)):
            reason = "a message holds an image itself. Put it into the column 'images', and leave {'type': 'image'}."
            yield Fault(column, IMAGE_IN_MESSAGE, reason)
            return
        reason = place_fault(conversation, len(row_images(row, "row")))
        if reason is not None:
            yield Fault(column, IMAGE_PLACES, reason)
            return
    if purpose == "dpo" and row.get(REJECTED_IMAGES) is not None:
        yield from _rejected_image_faults(row[REJECTED_IMAGES], conversations if is_well_formed else ())


def _rejected_image_faults(images: object, conversations: Iterable[Conversation]) -> Iterator[Fault]:
    """Faults of `rejected_images`, which take the places of the row's own."""
    if not isinstance(images, list | tuple) or not images:
        reason = f"it is {'empty' if images == [] else f'a {type(images).__name__}'}. It must be a list of images."
        yield Fault(REJECTED_IMAGES, WRONG_TYPE, reason)
        return
    reason = next(filter(None, (place_fault(conversation, len(images)) for conversation in conversations)), None)
    if reason is not None:
        yield Fault(REJECTED_IMAGES, IMAGE_PLACES, reason)


def _implicit_prompts(row: Row, purpose: str) -> list[Conversation]:
    """The conversations of a row whose replies begin with the prompt."""
    return [row[side] for side in REPLY_COLUMNS if side in PURPOSES[purpose].required and row.get(side)]
