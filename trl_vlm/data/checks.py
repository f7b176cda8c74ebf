"""Validation of a whole dataset before a run: every fault of every row, not just the first one after an hour."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trl_vlm.data.errors import RowError
from trl_vlm.data.faults import Fault
from trl_vlm.data.images import load_image
from trl_vlm.data.messages import CONTROL_TOKENS
from trl_vlm.data.rows import PURPOSES, REJECTED_IMAGES, Row, faults, row_images

OTHER_NUMBER = "another number of replies than in the first row"


class Problem(NamedTuple):
    """One fault of one row.

    Args:
        row: Its number.
        column: Where it is.
        reason: What is wrong with it, and what to do.
        kind: The same in the few words that faults are counted by.
        is_warning: Trainers take the row; it is probably not what was meant.
    """

    row: int
    column: str
    reason: str
    kind: str
    is_warning: bool


@dataclass
class CheckReport:
    """What `check_dataset` found.

    Args:
        rows: Rows seen.
        bad_rows: Rows with at least one fault that is more than a warning.
        images: Images of all rows.
        counts: Faults and warnings by column and kind.
        problems: The first faults and warnings, in the order of the rows.
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
    control_tokens: Iterable[str] = CONTROL_TOKENS,
    further: Callable[[Row], list[Fault]] | None = None,
) -> CheckReport:
    """Checks every row and collects what is wrong, by the rules of the trainers.

    A row that trainers accept is good, except that control tokens in its text (the end of a turn, for example) are
    reported: reward models never see them.

    Args:
        rows: The rows, images undecoded.
        purpose: What they are for: a key of `PURPOSES`.
        load_images: Decode every image, the only way to find a truncated one.
        images: Folder that relative image paths start at.
        max_problems: Keep this many faults in `problems`; all are counted.
        control_tokens: Tokens with a meaning to a tokenizer, such as the end of a turn; by default those of many
            families.
        further: Finds more faults in a row without any, such as those that only a model's processor shows.
    """
    control_tokens = tuple(control_tokens)
    if purpose not in PURPOSES:
        raise ValueError(f"`purpose` is {purpose!r}; it must be one of {', '.join(PURPOSES)}.")
    report, extra_replies = CheckReport(), None
    for index, row in enumerate(rows):
        found = row_faults(row, purpose, load_images=load_images, folder=images, control_tokens=control_tokens)
        if purpose == "dpo":
            count = _extra_replies(row)
            extra_replies = count if extra_replies is None else extra_replies
            if count is not None and count != extra_replies:
                reason = f"it holds {count} replies, and the first row's {extra_replies}. Every row needs as many."
                found.append(Fault("rejected_extra", OTHER_NUMBER, reason))
        if further is not None and all(fault.is_warning for fault in found):
            found += further(row)
        report.rows += 1
        report.bad_rows += not all(fault.is_warning for fault in found)
        report.images += image_count(row)
        report.counts.update(f"{fault.column}: {fault.kind}" for fault in found)
        kept = found[: None if max_problems is None else max_problems - len(report.problems)]
        report.problems += [Problem(index, f.column, f.reason, f.kind, f.is_warning) for f in kept]
    return report


def row_faults(
    row: Row,
    purpose: str,
    *,
    load_images: bool = True,
    folder: Path | None = None,
    control_tokens: Iterable[str] = CONTROL_TOKENS,
) -> list[Fault]:
    """All faults of a row, those of its images among them; see `PURPOSES` for `purpose`."""
    found = list(faults(row, purpose, control_tokens=control_tokens))
    return found + list(image_file_faults(row, folder)) if load_images else found


def image_file_faults(row: Row, folder: Path | None = None) -> Iterator[Fault]:
    """Faults of the images themselves: files that are missing, damaged, too large or no images."""
    try:
        values = row_images(row, "row")
    except RowError:
        return  # a fault of the columns, which has been reported
    own = "images" if row.get("image") is None else "image"
    given = row.get(REJECTED_IMAGES)
    for column, images in ((own, values), (REJECTED_IMAGES, given if isinstance(given, list | tuple) else ())):
        for number, value in enumerate(images):
            try:
                load_image(located(value, folder), name=f"image {number}")
            except RowError as error:
                yield Fault(column, error.kind, str(error))


def located(value: object, folder: Path | None) -> object:
    """The image, with a relative path joined to `folder`."""
    if folder is None:
        return value
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return {**value, "path": str(folder / value["path"])}
    return str(folder / value) if isinstance(value, str) else value


def image_count(row: Row) -> int:
    """How many images a row has, 0 where that is unknown."""
    try:
        return len(row_images(row, "row"))
    except RowError:
        return 0


def _extra_replies(row: Row) -> int | None:
    """How many further rejected replies a row has; None where that is unknown, which is a fault of its own."""
    extra = row.get("rejected_extra")
    return len(extra) if isinstance(extra, list | tuple) else 0 if extra is None else None
