"""The conversion of a whole dataset: read, convert, count, write; resumable, and nothing is dropped silently."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trl_vlm.data.converters.coco_objects import captions_of, read_annotations
from trl_vlm.data.converters.records import BadRecord, MissingColumns, Record, Row, read_json
from trl_vlm.data.converters.registry import checked_converter
from trl_vlm.data.converters.selection import Sample, Selection, Where
from trl_vlm.data.converters.splitting import (
    HeldOut,
    SplitOff,
    count_held_out,
    held_out_path,
    remove,
    split,
    whole_path,
)
from trl_vlm.data.faults import NOT_UNICODE
from trl_vlm.data.io.image_files import named_image, stored_image
from trl_vlm.data.io.output import Output
from trl_vlm.data.io.progress import Gap, blocks_of
from trl_vlm.data.io.source import Source
from trl_vlm.data.rows import faults

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """The result of a conversion: records read, rows written, records dropped by reason, rows held out."""

    output: str
    records: int
    rows: int
    dropped: dict[str, int]
    was_done: bool = False
    held_out: HeldOut | None = None


def convert(
    name: str,
    source: Source,
    output: str | Path,
    *,
    images: str | Path | None = None,
    facts: str | Path | None = None,
    embed_images: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
    limit: int | None = None,
    shard_records: int = 500,
    where: Mapping[str, Sequence[str]] | None = None,
    sample: int | None = None,
    split_off: int | float | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Report:
    """Converts a dataset and writes it; calling it again resumes an interrupted run, or does nothing.

    Args:
        name: Which dataset: a key of `CONVERTERS`.
        source: Where its records are.
        output: A folder (parquet shards), or a file that ends in .parquet or .jsonl.
        images: Folder of the image files that records name.
        facts: JSON file with the facts of each image, or COCO's captions, for the datasets that have them.
        embed_images: Store the bytes of image files instead of their paths; parquet only.
        skip_bad: Leave out records that make no row, and count them; otherwise the first one raises.
        overwrite: Replace a finished output, and forget an unfinished one.
        limit: Read this many records at most.
        shard_records: Records between saves.
        where: Column to values: only rows with one of these values, as text, are kept.
        sample: How many rows to draw of those that are left; all if None or if there are fewer.
        split_off: How many rows (or which share of the images, below 1) to hold out, by image, beside the output:
            `povid-heldout.parquet` beside `povid.parquet`. See `SplitOff`.
        seed: Of the sample, and of what is held out.
        progress: Show a progress bar.
        options: The converter's own options.

    Raises:
        BadRecord: A record cannot become a row (unless `skip_bad`), or the first one has other columns.
        ValueError: The converter has no such option, no record made a row, or all of them would be held out.
    """
    output = Path(output)
    selection = Selection(Where(where or {}), None if sample is None else Sample(sample, seed))
    run = Conversion(name, options, _path(images), _path(facts), embed_images, skip_bad, selection)
    _check_images(run.images, output, embed_images)
    source = replace(source, reader=run.converter.reader)
    identity = {**run.identity, "source": source.identity(), "limit": limit}
    fill = partial(run.fill, source, limit=limit, shard_records=shard_records, progress=progress)
    if split_off is not None:
        parts, columns = SplitOff(split_off, seed), run.converter.features(options)
        return _convert_and_split(output, identity, parts, columns, fill, overwrite=overwrite)
    with Output(output, identity, overwrite=overwrite) as writer:
        if not writer.is_done:
            fill(writer)
    done = writer.progress
    return Report(str(output), done.records, done.rows, dict(done.dropped), writer.is_done)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _check_images(images: Path | None, output: Path, embed_images: bool) -> None:
    """Refuses a folder of images that is not there, and bytes of images in text."""
    if embed_images and output.suffix == ".jsonl":
        raise ValueError("JSON Lines cannot hold the bytes of images. Drop `embed_images`, or write parquet.")
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"The folder of images {str(images)!r} does not exist.")


def _convert_and_split(
    output: Path,
    identity: Mapping[str, Any],
    wanted: SplitOff,
    columns: Mapping[str, Any],
    fill: Callable[[Output], None],
    *,
    overwrite: bool,
) -> Report:
    """Converts to a folder beside the output, and splits that; a run that dies goes on with the first of these."""
    held_path, whole_place = held_out_path(output), whole_path(output)
    identity = {**identity, "split_off": asdict(wanted)}
    with (
        Output(output, {**identity, "part": "kept"}, overwrite=overwrite) as kept,
        Output(held_path, {**identity, "part": "held out"}, overwrite=overwrite) as held,
    ):
        was_done = kept.is_done and held.is_done
        if not was_done:
            with Output(whole_place, identity, overwrite=overwrite) as whole:
                if not whole.is_done:
                    fill(whole)
            split(whole, kept, held, {name: columns[name] for name in whole.progress.columns}, wanted)
        remove(whole_place)
    done = kept.progress
    return Report(str(output), done.records, done.rows, dict(done.dropped), was_done, count_held_out(held_path))


@dataclass
class Conversion:
    """How the records of a dataset become the rows of an output.

    Args:
        name: The name of the converter.
        options: Its options.
        images: Folder of the image files that records name.
        facts: File with the facts of each image.
        embed_images: Whether rows hold the bytes of image files.
        skip_bad: Whether records that make no row are left out and counted.
        selection: Which rows are kept.
    """

    name: str
    options: Mapping[str, Any]
    images: Path | None
    facts: Path | None
    embed_images: bool
    skip_bad: bool
    selection: Selection

    def __post_init__(self) -> None:
        """Finds the converter, and refuses options that it does not have."""
        self.converter = checked_converter(self.name, self.options, self.facts)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a conversion to be resumed."""
        return {
            "converter": self.name,
            "options": dict(self.options),
            "images": str(self.images) if self.images is not None else None,
            "facts": str(self.facts) if self.facts is not None else None,
            "embed_images": self.embed_images,
            **self.selection.identity,
        }

    def fill(self, source: Source, writer: Output, *, limit: int | None, shard_records: int, progress: bool) -> None:
        """Writes the rows of a source, saving a shard after every `shard_records` records and at the end.

        Raises:
            ValueError: No record made a row.
        """
        if self.facts is not None:
            self.options = {**self.options, "facts": read_facts(self.facts)}
        if self.selection.sample is not None:
            logger.info("Drawing a sample of %d rows: all records are read once.", self.selection.sample.rows)
            self.selection.draw(source.records(limit=limit), self._good_rows)
        self._read(source, writer, limit, shard_records, progress)
        done = writer.progress
        if not done.rows:
            dropped = dict(done.dropped)
            raise ValueError(f"None of {done.records} records of {source.location!r} made a row: {dropped}.")
        writer.finish()

    def _read(self, source: Source, writer: Output, limit: int | None, shard_records: int, progress: bool) -> None:
        """Reads what is not yet read."""
        state = writer.progress
        if state.records:
            logger.info("Resuming after %d records.", state.records)
        total = limit if source.total is None else min(limit or source.total, source.total)
        with tqdm(total=total, initial=state.records, unit="record", disable=None if progress else True) as bar:
            for gap in state.gaps():
                stop, size = (limit, shard_records) if gap.stop is None else (gap.stop, gap.stop - gap.start)
                start = gap.start
                for block in blocks_of(source.records(skip=gap.start, limit=stop), size):
                    dropped: Counter[str] = Counter()
                    rows = self._rows_of_block(block, start, f"{source.location}, record", dropped, bar)
                    columns = self._columns_of(rows, writer)
                    writer.write_part(rows, columns, Gap(start, start + len(block), gap.shard), dropped)
                    start += len(block)

    def _rows_of_block(
        self, block: Sequence[Record], start: int, name: str, dropped: Counter[str], bar: tqdm
    ) -> list[Row]:
        """The rows of some records, the first of which has the number `start`."""
        rows: list[Row] = []
        for number, record in enumerate(block, start=start):
            rows += self._rows_of(record, number, f"{name} {number}", dropped)
            bar.update()
        return rows

    def _rows_of(self, record: Record, number: int, name: str, dropped: Counter[str]) -> list[Row]:
        """The rows of one record; what made none is counted in `dropped`."""
        left_out: Counter[str] = Counter()
        try:
            made = self.converter(record, **self.options)
            kept = self.selection.kept(made.rows, record, number, left_out)
            rows = [self._with_stored_images(row) for row in kept]
            for row in rows:
                refuse_faults(row)
        except BadRecord as error:
            another_data_set = isinstance(error, MissingColumns) and number == 0
            if another_data_set or not self.skip_bad:
                remedy = "" if another_data_set else "(`skip_bad` leaves such records out and counts them.)"
                raise type(error)(f"{name}: {error.reason}", f"{error.detail} {remedy}".strip()) from error
            dropped[error.reason] += 1
            return []
        dropped.update(made.dropped + left_out)
        return rows

    def _good_rows(self, record: Record) -> list[Row]:
        """The rows of one record as far as its text tells; none of a bad one, which is reported when it is written."""
        try:
            rows = self.converter(record, **self.options).rows
            for row in rows:
                refuse_faults(row)
        except BadRecord:
            return []
        return rows

    def _with_stored_images(self, row: Row) -> Row:
        """The row with its images as they are stored."""
        if self.images is None and not self.converter.needs_images:
            return {**row, "images": [named_image(name) for name in row["images"]]}
        stored = [stored_image(image, folder=self.images, embed=self.embed_images) for image in row["images"]]
        return {**row, "images": stored}

    def _columns_of(self, rows: list[Row], writer: Output) -> dict[str, Any]:
        """Name to feature of the rows' columns; all rows of a dataset have the same ones."""
        state, features = writer.progress, self.converter.features(self.options)
        for row in rows:
            state.columns = state.columns or list(row)
            if set(row) != set(state.columns):
                raise ValueError(f"A row has the columns {sorted(row)}, the ones before it {sorted(state.columns)}.")
        return {column: features[column] for column in state.columns}


def refuse_faults(row: Row) -> None:
    """Raises `BadRecord` for what trainers would refuse in a row, and for text that no file can hold."""
    for purpose in _purposes(row):
        for fault in faults(row, purpose):
            if not fault.is_warning:
                raise BadRecord(f"{fault.column}: {fault.kind}", fault.reason)
    for column, value in row.items():
        for text in texts_in(value):
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise BadRecord(f"{column}: {NOT_UNICODE}", f"half a character (a lone surrogate) in {text[:60]!r}")


def _purposes(row: Row) -> tuple[str, ...]:
    """What a row may be used for."""
    if "chosen" in row:
        return ("dpo",)
    return ("sft",) if "messages" in row else ("sft", "ppo") if "completion" in row else ("ppo",)


def texts_in(value: object) -> Iterator[str]:
    """All strings in a value of a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(each)


def read_facts(path: Path) -> dict[str, list[str]]:
    """The facts of each image from a JSON object of lists, or the captions of COCO's own file."""
    if not path.is_file():
        raise FileNotFoundError(f"The facts file {str(path)!r} does not exist.")
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise ValueError(
            f"The facts file {str(path)!r} holds a {type(facts).__name__}; it must be an object, image name -> facts."
        )
    if {"images", "annotations"} <= facts.keys():
        captions = captions_of(path)
        return {image["file_name"]: captions[image["id"]] for image in read_annotations(path, ("images",))["images"]}
    return facts
