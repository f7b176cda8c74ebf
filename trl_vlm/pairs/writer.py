"""A dataset of pairs, made by a source on any number of processes; a killed run can be resumed."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from trl_vlm.data.errors import BadRecord, RowError
from trl_vlm.data.io.card import write_card
from trl_vlm.data.io.image_files import stored_image
from trl_vlm.data.io.output import Output
from trl_vlm.data.io.progress import Gap, blocks_of
from trl_vlm.data.io.shards import features_of, give_one_schema
from trl_vlm.data.io.source import Source
from trl_vlm.data.messages import IMAGE_TOKENS
from trl_vlm.data.rows import IMAGE_COLUMNS, ROW_NAME, Row, row_images
from trl_vlm.judges.spending import spending_of
from trl_vlm.models.image_tokens import image_tokens
from trl_vlm.pairs.source import (
    PAIR_BATCH_SIZE,
    Deferred,
    PairSource,
    Policy,
    SurveyingSource,
    begin_pairs,
    check_source_row,
    finish_pairs,
)

logger = logging.getLogger(__name__)

NO_PAIR = "the source gave no pair"
BAD_ROW = "bad row"


@dataclass(frozen=True)
class PairReport:
    """The result of a run.

    Args:
        output: Where the pairs are.
        rows: Rows read.
        pairs: Pairs written.
        dropped: Rows without a pair, by reason.
        rows_per_second: Of this run.
        was_done: Whether an earlier run had done all of it.
    """

    output: str
    rows: int
    pairs: int
    dropped: dict[str, int]
    rows_per_second: float
    was_done: bool = False


class Outcome(NamedTuple):
    """The result for a row: its pair without images, or None and the reason; or that it is made later."""

    pair: Row | Deferred | None
    reason: str = ""


class Named(NamedTuple):
    """A row of the dataset, and what it is called."""

    name: str
    row: Row


@dataclass
class PairWriter:
    """Writes the pairs that a source makes of a dataset.

    The rows are read in blocks. The processes share out the rows of a block; the first one puts their pairs in order
    and saves them, so that the result depends neither on the number of processes nor on the batch size. A run that
    dies loses only its current block; the next one, with the same arguments, resumes there.

    Args:
        source: Makes the pairs.
        policy: The model that it uses, on this process's device and ready to generate; None for sources without one.
        output: A folder (parquet shards and a README.md), or a file that ends in .parquet or .jsonl (and a .md).
        settings: What determines the pairs, for the card, and to refuse resuming with other settings; must be JSON.
        images: Folder that relative image paths start at.
        embed_images: Store the bytes of image files instead of their paths; parquet only.
        batch_size: Rows that the source gets at once.
        block_rows: Rows between saves.
        skip_bad: Leave out and count rows that the source refuses; otherwise the first one raises.
        overwrite: Replace a finished output, and forget an unfinished one.
        progress: Show a progress bar.
    """

    source: PairSource
    policy: Policy | None
    output: str | Path
    settings: Mapping[str, Any]
    images: str | Path | None = None
    embed_images: bool = False
    batch_size: int = PAIR_BATCH_SIZE
    block_rows: int = 256
    skip_bad: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuses invalid arguments before a model runs."""
        if self.batch_size < 1 or self.block_rows < 1:
            raise ValueError(
                f"`batch_size` is {self.batch_size} and `block_rows` {self.block_rows}; needed: 1 or more."
            )
        if self.embed_images and Path(self.output).suffix == ".jsonl":
            raise ValueError("JSON Lines cannot hold the bytes of images. Drop `embed_images`, or write parquet.")
        if self.images is not None and not Path(self.images).is_dir():
            raise FileNotFoundError(f"The folder of images {str(self.images)!r} does not exist.")

    def write(self, dataset: Source, limit: int | None = None) -> PairReport | None:
        """Makes and writes the pairs of `dataset`, of `limit` rows at most; returns the report on the first process.

        Raises:
            ValueError: A row is bad (unless `skip_bad`), an earlier run with other settings is unfinished, or no row
                gave a pair.
            FileExistsError: The output exists, and is not what would be written.
            OutputInUse: Another run is writing it.
        """
        if not PartialState().is_main_process:
            gaps = _same_on_all(None)
            if gaps is not None:
                self._blocks(dataset, gaps, limit, None)
            return None
        with self._output(dataset, limit) as output:
            _same_on_all(None if output.is_done else output.progress.gaps())
            if output.is_done:
                return self._report(output, 0.0)
            start = time.monotonic()
            read = self._blocks(dataset, output.progress.gaps(), limit, output)
            seconds = time.monotonic() - start
            return self._finish(output, read / seconds if read else 0.0)

    def _output(self, dataset: Source, limit: int | None) -> Output:
        """The output, on the first process; if it cannot be written, all processes raise."""
        identity = {**self.settings, "dataset": dataset.identity(), "limit": limit}
        try:
            return Output(Path(self.output), identity, overwrite=self.overwrite)
        except (ValueError, OSError) as error:
            _same_on_all(error)
            raise

    def _blocks(self, dataset: Source, gaps: Sequence[Gap], limit: int | None, output: Output | None) -> int:
        """Makes and saves block after block; returns how many rows they had."""
        if isinstance(self.source, SurveyingSource):
            self.source.survey(
                {**row, ROW_NAME: named(place)} for place, row in enumerate(dataset.records(limit=limit))
            )
        skip, read = output.progress.records if output is not None else 0, 0
        if skip:
            logger.info("Resuming after %d rows.", skip)
        total = limit if dataset.total is None else min(limit or dataset.total, dataset.total)
        hidden = None if self.progress and output is not None else True
        with tqdm(total=total, initial=skip, unit="row", disable=hidden) as bar:
            for gap in gaps:
                stop, size = (limit, self.block_rows) if gap.stop is None else (gap.stop, gap.stop - gap.start)
                place = gap.start
                for block in blocks_of(dataset.records(skip=gap.start, limit=stop), size):
                    self._block(block, Gap(place, place + len(block), gap.shard), output, bar)
                    place += len(block)
                    read += len(block)
                    bar.update(skip + read - bar.n)
        return read

    def _block(self, block: Sequence[Row], gap: Gap, output: Output | None, bar: tqdm) -> None:
        """Makes the pairs of some rows on all processes; the first one saves them."""
        start, state = time.monotonic(), PartialState()
        rows = [Named(named(place), row) for place, row in enumerate(block, start=gap.start)]
        outcomes = self._outcomes(rows[state.process_index :: state.num_processes], bar)
        gathered = gather_object([outcomes])  # each process's share, in the order of processes
        if output is not None:
            ordered = [gathered[place % len(gathered)][place // len(gathered)] for place in range(len(rows))]
            self._save(output, gap, rows, ordered)
            rate = len(rows) / (time.monotonic() - start)
            logger.info("%d rows, %d pairs, %.2f rows/s", output.progress.records, output.progress.rows, rate)

    def _outcomes(self, named: Sequence[Named], bar: tqdm) -> list[Outcome]:
        """What the source makes of this process's rows; what it leaves for later is finished over several batches."""
        outcomes: list[Outcome] = []
        for batch in blocks_of(named, self.batch_size):
            outcomes += self._attempt(batch)
            if spent := spending_of(self.source):
                bar.set_postfix_str(str(spent))
            bar.update(len(batch))
            if sum(isinstance(outcome.pair, Deferred) for outcome in outcomes) >= self.batch_size:
                self._finish_deferred(outcomes)
        self._finish_deferred(outcomes)
        return outcomes

    def _attempt(self, named: Sequence[Named]) -> list[Outcome]:
        try:
            rows = [self._loaded(name, row) for name, row in named]
            # None for sources that ask no model
            return self._counted(lambda: begin_pairs(self.source, rows, cast(Policy, self.policy)))
        except RowError as error:
            if not self.skip_bad:
                raise
            if len(named) == 1:
                logger.warning("Left out: %s", error)
                return [Outcome(None, BAD_ROW)]
            return [outcome for each in named for outcome in self._attempt([each])]

    def _finish_deferred(self, outcomes: list[Outcome]) -> None:
        """Puts the outcomes of rows that waited into the list."""
        waiting = {place: outcome.pair for place, outcome in enumerate(outcomes) if isinstance(outcome.pair, Deferred)}
        made = self._counted(lambda: finish_pairs(list(waiting.values()), cast(Policy, self.policy)))
        for place, outcome in zip(waiting, made, strict=True):
            outcomes[place] = outcome

    def _counted(self, make: Callable[[], Sequence[Row | Deferred | None]]) -> list[Outcome]:
        """What the source makes, with its reasons for rows without a pair."""
        # getattr: sources that never give None have no such counter.
        before = Counter(getattr(self.source, "dropped", ()))
        made = make()
        reasons = list((Counter(getattr(self.source, "dropped", ())) - before).elements())
        reasons += [NO_PAIR] * (sum(entry is None for entry in made) - len(reasons))
        left = iter(reasons)
        return [
            Outcome(None, next(left))
            if entry is None
            else Outcome(entry if isinstance(entry, Deferred) else _without_images(entry))
            for entry in made
        ]

    def _loaded(self, name: str, row: Row) -> dict[str, Any]:
        """The row as sources get it, once it is seen to be good: with its name, and its images where they are."""
        check_source_row(row, name, IMAGE_TOKENS if self.policy is None else image_tokens(self.policy.processor))
        return {**_without_images(row), "images": self._stored(name, row), ROW_NAME: name}

    def _stored(self, name: str, row: Row) -> list[dict[str, Any]]:
        folder = Path(self.images) if self.images is not None else None
        try:
            return [stored_image(image, folder=folder, embed=self.embed_images) for image in row_images(row, name)]
        except BadRecord as error:
            raise RowError(f"{name}: {error}", error.kind) from error

    def _save(self, output: Output, gap: Gap, rows: Sequence[Named], outcomes: Sequence[Outcome]) -> None:
        """Writes the pairs of a block, and counts the rows without one."""
        pairs: list[dict[str, Any]] = []
        dropped: Counter[str] = Counter()
        for (name, row), (pair, reason) in zip(rows, outcomes, strict=True):
            assert not isinstance(pair, Deferred)  # all are finished
            if pair is None:
                dropped[reason] += 1
            else:
                kept = {column: value for column, value in pair.items() if column != ROW_NAME}
                pairs.append({"images": self._stored(name, row), **kept})
        output.write_part(pairs, features_of(pairs) if pairs else {}, gap, dropped)

    def _finish(self, output: Output, rate: float) -> PairReport:
        done = output.progress
        if not done.rows:
            raise ValueError(f"None of {done.records} rows gave a pair: {dict(done.dropped)}.")
        if not output.as_json:
            give_one_schema(output.partial)
        card = output.destination.with_suffix(".md") if output.is_file else output.partial / "README.md"
        write_card(card, output.destination.stem, output.partial, done, rate)
        output.finish()
        return self._report(output, rate)

    def _report(self, output: Output, rate: float) -> PairReport:
        done, place = output.progress, str(output.destination)
        return PairReport(place, done.records, done.rows, dict(done.dropped), rate, output.is_done)


def _same_on_all(value: list[Gap] | Exception | None) -> list[Gap] | None:
    """The result of the first process, on all of them; its error is raised on the others, too."""
    values: list[Any] = [value]
    broadcast_object_list(values)
    if isinstance(values[0], Exception) and not PartialState().is_main_process:
        raise values[0]
    return cast(list[Gap] | None, values[0])


def named(place: int) -> str:
    """What errors call the row with this number, and what its random draws depend on."""
    return f"row {place}"


def _without_images(row: Row) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column not in IMAGE_COLUMNS}
