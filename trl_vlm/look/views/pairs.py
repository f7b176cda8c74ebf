"""Preference pairs: both replies side by side, the segments that training weighs, and where the pair is from."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean, median
from typing import Any

from trl_vlm.data.faults import EMPTY_REPLY, MALFORMED, MISSING
from trl_vlm.data.messages import message_text, reply_text
from trl_vlm.data.rows import faults, name_of, row_images
from trl_vlm.evaluation.objects.finder import ObjectFinder
from trl_vlm.look.segments import Segments, Side
from trl_vlm.look.shown import LONGEST_CHIP, Link, RowsView, ShownRow, ShownText, isolated, shown_values, signed
from trl_vlm.look.thumbnails import Originals, Thumbnails

AT_ONCE = 64  # rows whose images are made small together
KNOWN = ("prompt", "chosen", "rejected", "rejected_extra", "images", "image", "facts", "objects", "rejected_images")
SPANS = ("chosen_spans", "rejected_spans")
REWARDS = ("reward_chosen", "reward_rejected")
PREFIX = "pair_"
SOURCES = 6  # that a summary names
GATE = ("similarity", "guided", "unfinished", "masked_ratio")  # what BDHS reports of its gate


def pairs_view(
    rows: Iterable[Mapping[str, Any]],
    thumbnails: Thumbnails,
    segments: Segments,
    *,
    name: str = "pairs",
    title: str = "Pairs",
    originals: Originals | None = None,
) -> RowsView:
    """A view of preference pairs.

    Args:
        rows: Rows of a dataset, images undecoded.
        thumbnails: Gets their images.
        segments: Finds what differs.
        name: The view's name in addresses.
        title: Its name for people.
        originals: The image files of annotated rows.

    Raises:
        RowError: A row is no pair.
    """
    shown: list[ShownRow] = []
    numbered = enumerate(rows)
    while block := list(islice(numbered, AT_ONCE)):
        shown += _shown_rows(block, thumbnails, segments, originals)
    if not shown:
        raise ValueError("there are no pairs to look at: the dataset is empty.")
    tables = [table for table in (gate_table(shown),) if table]
    summary = [*summary_of(shown, segments.unit), segments.about]
    return RowsView(name, title, shown, summary, ("added", "removed"), tables)


def _shown_rows(
    block: Sequence[tuple[int, Mapping[str, Any]]],
    thumbnails: Thumbnails,
    segments: Segments,
    originals: Originals | None,
) -> Iterator[ShownRow]:
    wrong = [_fault(row, f"row {number}") for number, row in block]
    images = [row_images(row, f"row {number}") for number, row in block]
    flat = [
        (image, f"row {number}, image {place}")
        for (number, _), each in zip(block, images, strict=True)
        for place, image in enumerate(each)
    ]
    made = iter(thumbnails.add(flat))
    for (number, row), each, fault in zip(block, images, wrong, strict=True):
        found = [next(made) for _ in each]
        source = originals.place(each[0]) if originals is not None and each else None
        yield _shown_row({**row, "fault": fault}, number, found, segments, source)


def _fault(row: Mapping[str, Any], name: str) -> str | None:
    """The kind of a row's first fault, to be shown and filtered by; a row that is no pair at all raises."""
    kinds = []
    for fault in faults(row, "dpo"):
        if fault.kind in (MISSING, *MALFORMED) and fault.kind != EMPTY_REPLY and not fault.is_warning:
            raise fault.error(name)
        kinds.append(fault.kind)
    return kinds[0] if kinds else None


def _shown_row(
    row: Mapping[str, Any], number: int, images: Sequence[int | str], segments: Segments, source: str | None
) -> ShownRow:
    replies = {column: reply_text(row[column]) for column in ("chosen", "rejected")}
    spans = _spans(row, "chosen"), _spans(row, "rejected")
    sides = segments.of_pair(replies["chosen"], replies["rejected"], *spans)
    texts = [
        ShownText(column, column, reply, side.marks, note=_note(row, column, side, segments.unit))
        for (column, reply), side in zip(replies.items(), sides, strict=True)
    ]
    texts += [
        ShownText(f"rejected, {place}", "rejected", reply_text(extra))
        for place, extra in enumerate(row.get("rejected_extra") or (), start=2)
    ]
    values, said = _values(row, replies, sides)
    return ShownRow(
        name_of(row, number),
        prompt_turns(row.get("prompt") or ""),
        texts,
        [image for image in images if isinstance(image, int)],
        [str(fact) for fact in row.get("facts") or ()],
        shown_values(values),
        said,
        " ".join(image for image in images if isinstance(image, str)),
        source,
    )


def prompt_turns(prompt: str | Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(role, text) of each turn."""
    if isinstance(prompt, str):
        return [("user", prompt)]
    return [(message["role"], message_text(message)) for message in prompt]


def _spans(row: Mapping[str, Any], column: str) -> list[tuple[int, int]] | None:
    """The spans of a reply; they count from where its last turn begins."""
    spans, reply = row.get(f"{column}_spans"), row[column]
    if spans is None:
        return None
    start = 0 if isinstance(reply, str) else len(reply_text(reply)) - len(message_text(reply[-1]))
    return [(start + int(first), start + int(last)) for first, last, *_ in spans]


def _note(row: Mapping[str, Any], column: str, side: Side, unit: str) -> str:
    parts = [f"{side.changed} of {side.units} {unit}, {100 * side.share:.0f}\u00a0% of the weight"]
    reward = row.get(f"reward_{column}")
    if isinstance(reward, int | float):
        parts.insert(0, f"reward {signed(reward)}")
    return ", ".join(parts)


def _values(
    row: Mapping[str, Any], replies: Mapping[str, str], sides: Sequence[Side]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The values that a pair is filtered by, and the longer texts of its columns."""
    values: dict[str, Any] = {}
    said = []
    for key, value in row.items():
        name = key.removeprefix(PREFIX)
        if key in KNOWN or key in SPANS or key in REWARDS or key == "row_name" or value is None:
            continue
        if isinstance(value, str) and len(value) > LONGEST_CHIP:
            said.append((name, value))
        elif isinstance(value, bool | int | float | str):
            values[name] = value
    chosen, rejected = (row.get(column) for column in REWARDS)
    if isinstance(chosen, int | float) and isinstance(rejected, int | float):
        values["reward_margin"] = float(chosen - rejected)
    values["changed"] = sum(side.changed for side in sides)
    words = [len(reply.split()) for reply in replies.values()]
    values["longer"] = words[0] - words[1]
    if row.get("objects"):
        values |= _invented(row["objects"], replies)
    return values, said


def _invented(objects: Sequence[str], replies: Mapping[str, str]) -> dict[str, int]:
    finder = ObjectFinder().with_names(objects)
    shown = finder.classes_of(objects)
    return {f"invented_{column}": len(set(finder.names(reply)) - shown) for column, reply in replies.items()}


def summary_of(rows: Sequence[ShownRow], unit: str) -> list[str | Link]:
    """A summary to be read before the pairs."""

    def column(name: str) -> list[Any]:
        return [row.values[name] for row in rows if name in row.values]

    counts = Counter(map(str, column("source"))).most_common()
    sources = ", ".join(f"{count:,} from {isolated(name)}" for name, count in counts[:SOURCES])
    sources += f", and {len(counts) - SOURCES} other sources" if len(counts) > SOURCES else ""
    said: list[str | Link] = [f"{len(rows):,} pairs" + (f": {sources}." if sources else ".")]
    middle = median(column("changed"))
    said.append(Link(f"Half of them differ in {middle:g} {unit} or fewer.", f"changed<={middle:g} sort:changed"))
    longer = 100 * fmean(words > 0 for words in column("longer"))
    said.append(Link(f"The chosen reply is the longer one in {longer:.0f}\u00a0% of them.", "longer>0 sort:-longer"))
    wrong = sum(margin <= 0 for margin in column("reward_margin"))
    if wrong:
        filter = "reward_margin<=0 sort:reward_margin"
        said.append(Link(f"The reward model does not prefer the chosen reply in {wrong:,} pairs.", filter))
    problems = sum(bool(row.problem) for row in rows)
    if problems:
        said.append(f"The images of {problems:,} rows cannot be shown.")
    return said


def gate_table(rows: Sequence[ShownRow]) -> list[list[str]]:
    """Statistics of the gate of BDHS by iteration: means, and rates of boolean columns; [] without a gate."""
    iterations = sorted({row.values["iterations"] for row in rows if "iterations" in row.values}, key=str)
    reported = [name for name in GATE if any(name in row.values for row in rows)]
    table = [["iteration", "pairs", "share", *(name.replace("_", " ") for name in reported)]]
    total = sum("iterations" in row.values for row in rows)
    for iteration in iterations:
        group = [row for row in rows if row.values.get("iterations") == iteration]
        cells = [_mean(group, name) for name in reported]
        table.append([str(iteration), f"{len(group):,}", f"{100 * len(group) / total:.0f}\u00a0%", *cells])
    return table if iterations else []


def _mean(rows: Sequence[ShownRow], name: str) -> str:
    values = [value for row in rows if isinstance(value := row.values.get(name), int | float)]
    if not values:
        return "–"
    share = all(isinstance(value, bool) for value in values)
    return f"{100 * fmean(values):.0f}\u00a0%" if share else signed(fmean(values))
