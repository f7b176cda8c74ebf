"""The card of a dataset of pairs: how it was made, with statistics of its `pair_*` columns."""

import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl_vlm import __version__
from trl_vlm.data.io.atomic import write_whole
from trl_vlm.data.io.progress import Progress
from trl_vlm.data.io.shards import read_columns
from trl_vlm.data.messages import message_text

PREFIX = "pair_"
REPLIES = ("chosen", "rejected")
TAGS = ("trl", "trl-vlm", "preference")
PACKAGES = ("torch", "transformers", "datasets")
MOST_VALUES = 12  # a text column with more of them is not counted
BINS = 10
BAR = 30  # characters
LONGEST_CELL = 200  # characters
SPECIAL = re.compile(r"[\\`*\[\]|!~$]|(?<!\w)_|_(?!\w)")


def write_card(file: Path, title: str, shards: Path, progress: Progress, rows_per_second: float) -> None:
    """Writes the card atomically.

    Args:
        file: Where to.
        title: Name of the dataset.
        shards: Folder of its shards.
        progress: Counts of what was read, written and left out, and the settings.
        rows_per_second: Of the last run.
    """
    lines = ["---", "tags:", *(f"- {tag}" for tag in TAGS), "---", "", f"# {as_text(title)}", ""]
    lines += [f"{progress.rows} pairs of {progress.records} rows, made by `trl-vlm pairs`.", ""]
    lines += [*_settings(progress), *_rows(progress, "pairs", "no pair")]
    lines += [f"The last run made {rows_per_second:.2f} rows per second.", ""]
    lines += statistics(read_columns(shards, REPLIES, PREFIX))
    write_whole(file, "\n".join(lines).rstrip() + "\n")


def conversion_card(title: str, origin: str, progress: Progress) -> str:
    """The card of a converted public dataset.

    Args:
        title: Name of the dataset.
        origin: Hub id or name of what was converted.
        progress: Counts of what was read, written and left out, and the settings.
    """
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", origin) and not origin.endswith((".json", ".jsonl"))
    linked = f"[{origin}](https://huggingface.co/datasets/{origin})" if is_id else f"`{origin}`"
    lines = [f"# {as_text(title)}", "", f"{linked} in the columns of TRL, converted by `trl-vlm convert`. The license"]
    lines[-1] += " and the terms are those of the original: read them there."
    lines += ["", *_settings(progress), *_rows(progress, "rows", "left out")]
    return "\n".join(lines)


def _settings(progress: Progress) -> list[str]:
    """What the dataset was made with."""
    settings = json.dumps(progress.identity, indent=2, ensure_ascii=False)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", settings)), default=0))
    versions = {"trl-vlm": __version__, **{package: version(package) for package in PACKAGES}}
    listed = ", ".join(f"{package} {release}" for package, release in versions.items())
    return ["## Settings", "", f"{fence}json", settings, fence, "", f"Versions: {listed}.", ""]


def _rows(progress: Progress, made: str, left_out: str) -> list[str]:
    """How many rows there are, and why others are not."""
    counts = {made: progress.rows, **{f"{left_out}: {why}": n for why, n in sorted(progress.dropped.items())}}
    shares = [(name, count, f"{count / progress.records:.1%}") for name, count in counts.items()]
    return ["## Rows", "", *table(("rows", "count", "share"), shares)]


def statistics(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines about the replies' lengths and each column `pair_*`."""
    values: dict[str, list[Any]] = defaultdict(list)
    lengths: dict[str, list[int]] = {side: [] for side in REPLIES}
    for row in rows:
        for side in REPLIES:
            lengths[side].append(len(message_text(row[side][-1])))
        for column, value in row.items():
            if column.startswith(PREFIX) and isinstance(value, str | bool | int | float):
                values[column].append(value)
    lines = ["## Replies", ""]
    means = [(side, f"{sum(each) / len(each):.1f}") for side, each in lengths.items()]
    lines += table(("reply", "mean characters"), means)
    for column in sorted(values):
        lines += list(about(column, values[column]))
    return lines


def about(column: str, values: Sequence[Any]) -> Iterator[str]:
    """Lines about one column: the shares of its values, or a histogram of numbers with a point."""
    if any(isinstance(value, float) for value in values):
        yield from (heading(column), "", f"Mean {sum(values) / len(values):.4f}.", "", "```text")
        yield from histogram(values)
        yield from ("```", "")
        return
    counts = Counter(values)
    if len(counts) > MOST_VALUES:
        return
    yield from (heading(column), "")
    shares, so_far = [], 0
    for value in sorted(counts):
        so_far += counts[value]
        shares.append((value, counts[value], f"{counts[value] / len(values):.1%}", f"{so_far / len(values):.1%}"))
    if all(type(value) is int for value in counts):
        yield from table((column, "pairs", "share", "up to here"), shares)
    else:
        yield from table((column, "pairs", "share"), [row[:3] for row in shares])


def histogram(values: Sequence[float]) -> Iterator[str]:
    """A line for each of ten equal intervals between the smallest and the largest value."""
    low, high = min(values), max(values)
    bins = BINS if high > low else 1
    width = (high - low) / bins
    counts = Counter(min(int((value - low) / width), bins - 1) if width else 0 for value in values)
    for bin_ in range(bins):
        count = counts[bin_]
        bar = "#" * round(BAR * count / max(counts.values()))
        yield f"{low + bin_ * width:8.3f} to {low + (bin_ + 1) * width:7.3f}  {count:7d}  {bar}".rstrip()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table and an empty line."""
    head, *rows = ([as_text(cell) for cell in line] for line in (head, *rows))
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)] + [""]


def as_text(value: object) -> str:
    """Text of a model or a file as one line, escaped for Markdown and HTML."""
    text = "".join(letter if letter.isprintable() else " " for letter in " ".join(str(value).split()))
    text = text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + "…"
    text = html.escape(SPECIAL.sub(r"\\\g<0>", text), quote=False)
    return text.replace("://", ":&#47;/").replace("www.", "www&#46;")  # else they become links by themselves


def heading(column: str) -> str:
    """The heading of a column's section."""
    return f"## `{' '.join(column.replace('`', ' ').split())}`"
