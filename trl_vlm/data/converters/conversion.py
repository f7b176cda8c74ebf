"""The conversion of a whole dataset: read, convert, count, write; resumable, and nothing is dropped silently."""

import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trl_vlm.data.converters import (
    annotations,
    coco_objects,
    fact_rlhf,
    llava_human_preference,
    multimodal_rewardbench,
    nlf,
    povid,
    rlaif_v,
    rlhf_v,
    vl_rewardbench,
    vlfeedback,
)
from trl_vlm.data.converters.records import BadRecord, Converted, MissingColumns, Record, Row
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
class Converter:
    """One public dataset.

    Args:
        function: `to_row(record, **options)`, or `to_rows` where one record makes several rows.
        columns: Name to `datasets` feature of all the columns that its rows may have.
        hub_id: Where it is published; of a dataset with a reader of its own, the folder that it is unpacked to.
        reader: Reads the records of a folder, where these are not the lines of its files.
        needs_images: Whether rows are only made of images that are there.
    """

    function: Callable[..., Row | Converted]
    columns: Mapping[str, Any]
    hub_id: str
    reader: Callable[[Path], Iterator[Record]] | None = None
    needs_images: bool = True

    @property
    def options(self) -> list[str]:
        """The names of the function's options."""
        return list(inspect.signature(self.function).parameters)[1:]

    def __call__(self, record: Record, **options: Any) -> Converted:
        """The rows of one record."""
        made = self.function(record, **options)
        return made if isinstance(made, Converted) else Converted([made])


CONVERTERS = {
    "rlhf-v": Converter(rlhf_v.to_row, rlhf_v.COLUMNS, "openbmb/RLHF-V-Dataset"),
    "rlaif-v": Converter(rlaif_v.to_row, rlaif_v.COLUMNS, "openbmb/RLAIF-V-Dataset"),
    "vlfeedback": Converter(vlfeedback.to_rows, vlfeedback.COLUMNS, "MMInstruction/VLFeedback"),
    "povid": Converter(povid.to_row, povid.COLUMNS, "YiyangAiLab/POVID_preference_data_for_VLLMs"),
    "llava-human-preference": Converter(
        llava_human_preference.to_row, llava_human_preference.COLUMNS, "zhiqings/LLaVA-Human-Preference-10K"
    ),
    "nlf": Converter(nlf.to_row, nlf.COLUMNS, "YangyiYY/LVLM_NLF"),
    "fact-rlhf": Converter(fact_rlhf.to_row, fact_rlhf.COLUMNS, "zhiqings/LLaVA-RLHF-Data"),
    "vl-rewardbench": Converter(vl_rewardbench.to_row, vl_rewardbench.COLUMNS, "MMInstruction/VL-RewardBench"),
    "multimodal-rewardbench": Converter(
        multimodal_rewardbench.to_row, multimodal_rewardbench.COLUMNS, "data/all_data.json"
    ),
    "annotations": Converter(annotations.to_rows, annotations.COLUMNS, "annotations.jsonl"),
    "coco-objects": Converter(
        coco_objects.to_row, coco_objects.COLUMNS, "annotations", coco_objects.records, needs_images=False
    ),
}


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
    split_off: int | float | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Report:
    """Converts a dataset and writes it; calling it again resumes an interrupted run.

    After a finished run it does nothing.

    Args:
        name: Which dataset: a key of `CONVERTERS`.
        source: Where its records are.
        output: A folder (parquet shards), or a file that ends in .parquet or .jsonl.
        images: Folder of the image files that records name.
        facts: JSON file with the facts of each image (`image_to_caption.json`), for the datasets that have them.
        embed_images: Store the bytes of image files instead of their paths; parquet only.
        skip_bad: Leave out records that make no row, and count them; otherwise the first one raises.
        overwrite: Replace a finished output, and forget an unfinished one.
        limit: Read this many records at most.
        shard_records: Records between saves.
        split_off: How many rows (or which share of the images, below 1) to hold out, by image, beside the output:
            `povid-heldout.parquet` beside `povid.parquet`. See `SplitOff`.
        seed: Of what is held out.
        progress: Show a progress bar.
        options: The converter's own options.

    Raises:
        BadRecord: A record cannot become a row (unless `skip_bad`), or the first one has other columns.
        ValueError: The converter has no such option, or no record made a row, or all of them would be held out.
    """
    converter, output = checked_converter(name, options, facts), Path(output)
    wanted = None if split_off is None else SplitOff(split_off, seed)
    _check_images(images, output, embed_images)
    source = replace(source, reader=converter.reader)
    identity = {
        "converter": name,
        "source": source.identity(),
        "options": options,
        "images": str(images) if images is not None else None,
        "facts": str(facts) if facts is not None else None,
        "embed_images": embed_images,
        "limit": limit,
    }
    if facts is not None:
        options = {**options, "facts": read_facts(Path(facts))}
    folder = Path(images) if images is not None else None

    def fill(writer: Output) -> None:
        run = Conversion(converter, options, folder, embed_images, skip_bad, writer)
        run.read(source, limit=limit, shard_records=shard_records, progress=progress)
        run.finish(source)

    if wanted is not None:
        identity["split_off"] = asdict(wanted)
        return _convert_and_split(output, identity, wanted, converter.columns, fill, overwrite=overwrite)
    with Output(output, identity, overwrite=overwrite) as writer:
        if not writer.is_done:
            fill(writer)
    done = writer.progress
    return Report(str(output), done.records, done.rows, dict(done.dropped), writer.is_done)


def _check_images(images: str | Path | None, output: Path, embed_images: bool) -> None:
    """Refuses a folder of images that is not there, and bytes of images in text."""
    if embed_images and output.suffix == ".jsonl":
        raise ValueError("JSON Lines cannot hold the bytes of images. Drop `embed_images`, or write parquet.")
    if images is not None and not Path(images).is_dir():
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
    """One run of `convert`: its settings, and the place it writes to."""

    converter: Converter
    options: Mapping[str, Any]
    images: Path | None
    embed_images: bool
    skip_bad: bool
    writer: Output

    def read(self, source: Source, *, limit: int | None, shard_records: int, progress: bool) -> None:
        """Reads what is not yet read, and saves a shard after every `shard_records` records and at the end."""
        state = self.writer.progress
        if state.records:
            logger.info("Resuming after %d records.", state.records)
        total = limit if source.total is None else min(limit or source.total, source.total)
        with tqdm(total=total, initial=state.records, unit="record", disable=None if progress else True) as bar:
            for gap in state.gaps():
                stop, size = (limit, shard_records) if gap.stop is None else (gap.stop, gap.stop - gap.start)
                records = source.records(skip=gap.start, limit=stop)
                start = gap.start
                for block in blocks_of(records, size):
                    self.convert(block, start, f"{source.location}, record", gap.shard, bar)
                    start += len(block)

    def finish(self, source: Source) -> None:
        """Completes the output.

        Raises:
            ValueError: No record made a row.
        """
        done = self.writer.progress
        if not done.rows:
            dropped = dict(done.dropped)
            raise ValueError(f"None of {done.records} records of {source.location!r} made a row: {dropped}.")
        self.writer.finish()

    def convert(self, block: Sequence[Record], start: int, name: str, shard: int | None, bar: tqdm) -> None:
        """Writes the rows of some records, the first of which has the number `start`."""
        rows: list[Row] = []
        dropped: Counter[str] = Counter()
        for number, record in enumerate(block, start=start):
            rows += self.rows_of(record, number, f"{name} {number}", dropped)
            bar.update()
        self.writer.write_part(rows, self.features_of(rows), Gap(start, start + len(block), shard), dropped)

    def rows_of(self, record: Record, number: int, name: str, dropped: Counter[str]) -> list[Row]:
        """The rows of one record; what made none is counted in `dropped`."""
        try:
            made = self.converter(record, **self.options)
            rows = [self.with_stored_images(row) for row in made.rows]
            for row in rows:
                refuse_faults(row)
        except BadRecord as error:
            another_data_set = isinstance(error, MissingColumns) and number == 0
            if another_data_set or not self.skip_bad:
                remedy = "" if another_data_set else "(`skip_bad` leaves such records out and counts them.)"
                raise type(error)(f"{name}: {error.reason}", f"{error.detail} {remedy}".strip()) from error
            dropped[error.reason] += 1
            return []
        dropped.update(made.dropped)
        return rows

    def with_stored_images(self, row: Row) -> Row:
        """The row with its images as they are stored."""
        if self.images is None and not self.converter.needs_images:
            return {**row, "images": [named_image(name) for name in row["images"]]}
        stored = [stored_image(image, folder=self.images, embed=self.embed_images) for image in row["images"]]
        return {**row, "images": stored}

    def features_of(self, rows: list[Row]) -> dict[str, Any]:
        """Name to feature of the rows' columns; all rows of a dataset have the same ones."""
        state = self.writer.progress
        for row in rows:
            state.columns = state.columns or list(row)
            if set(row) != set(state.columns):
                raise ValueError(f"A row has the columns {sorted(row)}, the ones before it {sorted(state.columns)}.")
        return {column: self.converter.columns[column] for column in state.columns}


def refuse_faults(row: Row) -> None:
    """Raises `BadRecord` for what trainers would refuse in a row, and for text that no file can hold."""
    for fault in faults(row, "dpo" if "chosen" in row else "ppo"):
        if not fault.is_warning:
            raise BadRecord(f"{fault.column}: {fault.kind}", fault.reason)
    for column, value in row.items():
        for text in texts_in(value):
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise BadRecord(f"{column}: {NOT_UNICODE}", f"half a character (a lone surrogate) in {text[:60]!r}")


def texts_in(value: object) -> Iterator[str]:
    """All strings in a value of a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(each)


def checked_converter(name: str, options: Mapping[str, Any], facts: str | Path | None) -> Converter:
    """The converter called `name`; raises `ValueError` for an unknown one, and for options that it does not have."""
    if name not in CONVERTERS:
        raise ValueError(f"There is no converter {name!r}. There are: {', '.join(CONVERTERS)}.")
    converter = CONVERTERS[name]
    unknown = sorted(set(options) - set(converter.options))
    if facts is not None and "facts" not in converter.options:
        unknown.append("facts")
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}. It has: {', '.join(converter.options) or 'none'}."
        )
    return converter


def read_facts(path: Path) -> dict[str, list[str]]:
    """The facts of each image from a JSON object of lists."""
    if not path.is_file():
        raise FileNotFoundError(f"The facts file {str(path)!r} does not exist.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"The facts file {str(path)!r} is not JSON ({error}). Is the download complete?") from error
    if not isinstance(facts, dict):
        raise ValueError(
            f"The facts file {str(path)!r} holds a {type(facts).__name__}; it must be an object, image name -> facts."
        )
    return facts
