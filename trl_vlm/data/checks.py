"""Validation of a whole data set before a run: every row, every fault, instead of the first one an hour in."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trl_vlm.data.images import load_image
from trl_vlm.data.messages import message_text
from trl_vlm.data.rows import MESSAGE_COLUMNS, REPLY_COLUMNS, Row, check_row, row_images

# The columns that each use of a data set needs.
PURPOSES = {
    "dpo": ("prompt", "chosen", "rejected"),
    "reward": ("prompt", "chosen", "rejected"),
    "ppo": ("prompt",),
    "sft": ("prompt", "completion"),
}
# What processors put where an image is. As text in a message they make more image tokens than there are features.
IMAGE_MENTIONS = (
    "<image>",
    "<|image_pad|>",
    "<image_soft_token>",
    "<start_of_image>",
    "<IMG_CONTEXT>",
    "<|image|>",
)
NUMBER_COLUMNS = ("length_weight", "margin")


class Problem(NamedTuple):
    """One fault: the number of the row, the column, and what is wrong."""

    row: int
    column: str
    reason: str


@dataclass
class CheckReport:
    """What `check_dataset` found.

    Args:
        rows: Rows seen.
        bad_rows: Rows with at least one fault.
        images: Images loaded.
        counts: Faults by column and kind.
        problems: The first faults, in the order of the rows.
    """

    rows: int = 0
    bad_rows: int = 0
    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """True if there are rows, and none has a fault."""
        return self.rows > 0 and self.bad_rows == 0


def check_dataset(
    rows: Iterable[Row],
    purpose: str,
    *,
    load_images: bool = True,
    images: Path | None = None,
    max_problems: int | None = None,
) -> CheckReport:
    """Checks every row and collects what is wrong.

    Args:
        rows: The rows, images undecoded.
        purpose: What they are for: a key of `PURPOSES`.
        load_images: Decode every image, the only way to find a truncated one.
        images: Folder that relative image paths start at.
        max_problems: Keep this many faults in `problems`; all are counted.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"`purpose` is {purpose!r}; it must be one of {', '.join(PURPOSES)}.")
    report = CheckReport()
    for index, row in enumerate(rows):
        problems = row_problems(row, purpose, index=index)
        problems += image_problems(row, index=index, load_images=load_images, folder=images)
        report.rows += 1
        report.bad_rows += bool(problems)
        report.images += image_count(row)
        report.counts.update(f"{problem.column}: {kind_of(problem.reason)}" for problem in problems)
        report.problems += problems[: None if max_problems is None else max_problems - len(report.problems)]
    return report


def row_problems(row: Row, purpose: str, *, index: int = 0) -> list[Problem]:
    """All faults of a row but those of its images; see `PURPOSES` for `purpose`."""
    problems = []
    for column in PURPOSES[purpose]:
        if row.get(column) is None:
            problems.append(Problem(index, column, f"missing. The row has the columns {sorted(row)}."))
    for column in (*MESSAGE_COLUMNS, "facts", *NUMBER_COLUMNS):
        if row.get(column) is not None:
            reasons = contract_faults(row, column) or column_faults(row, column)
            problems += [Problem(index, column, reason) for reason in reasons]
    if row.get("answer") is not None and not (isinstance(row["answer"], str) and row["answer"].strip()):
        problems.append(Problem(index, "answer", f"{row['answer']!r} is not a gold answer: a string, or None."))
    problems += [Problem(index, "rejected_extra", reason) for reason in extra_reply_faults(row)]
    for column in ("chosen", "rejected"):
        problems += [Problem(index, f"{column}_spans", reason) for reason in span_faults(row, column)]
    return problems + [Problem(index, "rejected", reason) for reason in equal_reply_faults(row, row.get("rejected"))]


def contract_faults(row: Row, column: str) -> list[str]:
    """What `check_row` has to say about one column alone."""
    if column in NUMBER_COLUMNS and (isinstance(row[column], bool) or not isinstance(row[column], int | float)):
        return [f"{row[column]!r} is not a number."]
    try:
        # `margin` is the one number that `check_row` knows; every number must be finite like it.
        check_row({"margin" if column in NUMBER_COLUMNS else column: row[column]}, (), name="row")
    except (ValueError, TypeError) as error:
        return [re.sub(r"^row(, column '\w+')?: ", "", str(error))]
    return []


def column_faults(row: Row, column: str) -> list[str]:
    """Faults of a well-formed column: speakers in the wrong places, no question, text that stands for an image."""
    if column not in MESSAGE_COLUMNS:
        return []
    messages, faults = row[column], []
    last = messages[-1]["role"]
    if column in REPLY_COLUMNS and last != "assistant":
        faults.append(f"the reply is the {last}'s. Its last message must be the assistant's.")
    if column == "prompt":
        if last not in ("user", "tool"):
            faults.append(f"it ends on the {last}'s turn. A prompt ends on the user's, so that the assistant replies.")
        elif not message_text(messages[-1]).strip():
            faults.append("the last question is empty. Fill it in, or drop the row.")
    for message in messages:
        for mention in IMAGE_MENTIONS:
            if mention in message_text(message):
                faults.append(
                    f"the {message['role']}'s text has a literal {mention}, which is read as one more image. "
                    "Take it out: images of the `images` column are put at the first user turn."
                )
    return faults


def extra_reply_faults(row: Row) -> list[str]:
    """Faults of `rejected_extra`, a list of further rejected replies."""
    extra = row.get("rejected_extra")
    if extra is None:
        return []
    if not isinstance(extra, list | tuple):
        return [f"it is a {type(extra).__name__}. It must be a list of replies, each a list of messages."]
    faults = []
    for number, reply in enumerate(extra):
        as_row = {"rejected": reply}
        found = ["it is None."] if reply is None else contract_faults(as_row, "rejected")
        found = found or column_faults(as_row, "rejected") + equal_reply_faults(row, reply)
        faults += [f"reply {number}: {reason}" for reason in found]
    return faults


def span_faults(row: Row, column: str) -> list[str]:
    """Faults of `<column>_spans`: pairs (first character, one behind the last) of the reply's text."""
    spans = row.get(f"{column}_spans")
    if spans is None:
        return []
    try:
        length = len(message_text(row[column][-1]))
        outside = [(first, last) for first, last in spans if not 0 <= first < last <= length]
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        return ["it is not a list of pairs (first character, one behind the last) beside a reply."]
    return [f"the span {span} is not inside the reply of {length} characters." for span in outside]


def equal_reply_faults(row: Row, rejected: Any) -> list[str]:
    """A fault if `rejected` says the same as `chosen`: such a pair teaches nothing."""
    try:
        same = reply_text(row.get("chosen")) == reply_text(rejected)
    except (TypeError, AttributeError):  # no replies at all, which has been reported
        return []
    return ["it says the same as 'chosen'. Drop the row: such a pair teaches nothing."] if same else []


def reply_text(reply: Any) -> str:
    """The text of a reply; raises `TypeError` or `AttributeError` for what is no list of messages."""
    if not isinstance(reply, list | tuple):
        raise TypeError("no list of messages")
    return "".join(message_text(message) for message in reply).strip()


def image_problems(row: Row, *, index: int, load_images: bool, folder: Path | None = None) -> list[Problem]:
    """Faults of a row's images: both columns filled, a file that is not there or not whole, placeholders to spare."""
    column = "image" if row.get("images") is None else "images"
    try:
        values = row_images(row, f"row {index}")
    except (ValueError, TypeError) as error:
        return [Problem(index, column, str(error).removeprefix(f"row {index}: "))]
    problems = [Problem(index, column, reason) for reason in placeholder_faults(row, len(values))]
    for number, value in enumerate(values):
        if not load_images:
            continue
        try:
            load_image(located(value, folder), name=f"image {number}")
        except (ValueError, TypeError) as error:
            problems.append(Problem(index, column, str(error)))
    return problems


def placeholder_faults(row: Row, count: int) -> list[str]:
    """A fault if the images have no user turn to go to, or if structured content asks for another number of them."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list | tuple) or not all(isinstance(message, Mapping) for message in prompt):
        return []
    structured = [message["content"] for message in prompt if isinstance(message.get("content"), list | tuple)]
    if structured:
        asked = sum(is_placeholder(part) for parts in structured for part in parts)
        if asked != count:
            return [f"the row has {count} images, and its prompt has places for {asked}."]
    elif count and not any(message.get("role") == "user" for message in prompt):
        return ["the row has images, and its prompt has no user turn to put them at."]
    return []


def is_placeholder(part: Any) -> bool:
    """True for a content part that an image of the `images` column goes into."""
    return isinstance(part, Mapping) and part.get("type") == "image" and part.get("image") is None


def located(value: Any, folder: Path | None) -> Any:
    """`value`, with a relative path made to start at `folder`."""
    if folder is None:
        return value
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return {**value, "path": str(folder / value["path"])}
    return str(folder / value) if isinstance(value, str) else value


def image_count(row: Row) -> int:
    """How many images a row has, 0 where that cannot be told."""
    images = row.get("images")
    if isinstance(images, Sequence) and not isinstance(images, str):
        return len(images)
    return int(row.get("image") is not None)


def kind_of(reason: str) -> str:
    """A reason's first sentence without what is special to one row, to count by."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\b\d[\d,]*\b", "…", reason.split(". ")[0]).removesuffix(".")
