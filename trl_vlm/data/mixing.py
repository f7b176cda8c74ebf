"""Several converted datasets as one: each as often as its weight says, in an order that a seed draws."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from datasets import Features, Image, List
from tqdm.auto import tqdm

from trl_vlm.data.converters.selection import Sample
from trl_vlm.data.io.output import Output
from trl_vlm.data.io.progress import Gap, blocks_of
from trl_vlm.data.io.source import parquet_records

FORM = ("prompt", "completion", "messages", "chosen", "rejected")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Ingredient:
    """A dataset of a mix: a .parquet file, or a folder of them, and how often each of its rows occurs in the mix.

    Args:
        location: The file or folder.
        weight: 1 takes every row once, 2 twice, 0.5 a half of them, drawn by the seed.

    Raises:
        ValueError: The weight is not above 0.
        FileNotFoundError: There are no parquet files.
    """

    location: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuses a weight that takes nothing, and a location without files."""
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"The weight of {self.location!r} is {self.weight}; it must be above 0.")
        if not self.files:
            raise FileNotFoundError(
                f"There is no .parquet file, and no folder of them, at {self.location!r}. What is mixed is written by "
                "`trl-vlm convert` or `trl-vlm pairs`, in parquet."
            )

    @cached_property
    def files(self) -> list[Path]:
        """The parquet files, in their order."""
        path = Path(self.location)
        return (
            sorted(path.glob("*.parquet"))
            if path.is_dir()
            else [path] * (path.suffix == ".parquet" and path.is_file())
        )

    @cached_property
    def rows(self) -> int:
        """How many rows the files hold."""
        return sum(parquet.read_metadata(file).num_rows for file in self.files)

    @cached_property
    def features(self) -> dict[str, Any]:
        """Name to `datasets` feature of its columns."""
        return dict(Features.from_arrow_schema(parquet.read_schema(self.files[0])))

    @property
    def taken(self) -> int:
        """How many rows the mix has of it."""
        return round(self.weight * self.rows)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a mix to be resumed."""
        sizes = [[file.name, file.stat().st_size, file.stat().st_mtime] for file in self.files]
        return {"location": str(Path(self.location).resolve()), "weight": self.weight, "files": sizes}

    def records(self, seed: int) -> Iterator[Row]:
        """The rows that the mix has of it: all of them, as often as the weight says, and then a drawn part."""
        copies, rest = divmod(self.taken, self.rows)
        for _ in range(copies):
            yield from self._all()
        drawn = Sample(rest, seed).drawn([1] * self.rows) if rest else ()
        yield from (row for number, row in enumerate(self._all() if rest else ()) if (number, 0) in drawn)

    def _all(self) -> Iterator[Row]:
        for file in self.files:
            yield from parquet_records(file)


@dataclass(frozen=True)
class MixReport:
    """The result of a mix: where it is, and how many rows of each dataset it has."""

    output: str
    rows: int
    taken: dict[str, int]
    was_done: bool = False


def mix(
    ingredients: Sequence[Ingredient],
    output: str | Path,
    *,
    seed: int = 0,
    drop: Sequence[str] = (),
    overwrite: bool = False,
    shard_rows: int = 500,
    progress: bool = True,
) -> MixReport:
    """Writes several datasets as one; calling it again resumes an interrupted run.

    The rows of one dataset keep their order, and those of all are spread evenly by chance. A column that a dataset
    does not have is empty in its rows.

    Args:
        ingredients: The datasets with their weights.
        output: A folder (parquet shards), or a file that ends in .parquet or .jsonl.
        seed: Of the order, and of the rows that are drawn where a weight is not whole.
        drop: Columns to leave out.
        overwrite: Replace a finished output, and forget an unfinished one.
        shard_rows: Rows between saves.
        progress: Show a progress bar.

    Raises:
        ValueError: The rows are of different forms, a column has different types, or no row is taken.
    """
    columns = common_columns(ingredients, drop)
    taken = [each.taken for each in ingredients]
    if not sum(taken):
        raise ValueError("The weights take no row. Raise them.")
    identity = {"mix": [each.identity for each in ingredients], "seed": seed, "drop": sorted(drop)}
    with Output(Path(output), identity, overwrite=overwrite) as writer:
        if not writer.is_done:
            _fill(writer, lambda: _mixed(ingredients, seed), columns, sum(taken), shard_rows, progress)
    counts = {each.location: count for each, count in zip(ingredients, taken, strict=True)}
    return MixReport(str(output), writer.progress.rows, counts, writer.is_done)


def _fill(
    writer: Output,
    rows: Callable[[], Iterable[Row]],
    columns: Mapping[str, Any],
    total: int,
    shard_rows: int,
    progress: bool,
) -> None:
    """Writes what is not yet written."""
    writer.progress.columns = list(columns)
    with tqdm(total=total, initial=writer.progress.records, unit="row", disable=None if progress else True) as bar:
        for gap in writer.progress.gaps():
            start, size = gap.start, shard_rows if gap.stop is None else gap.stop - gap.start
            for block in blocks_of(islice(rows(), gap.start, gap.stop), size):
                made = [{column: row.get(column) for column in columns} for row in block]
                writer.write_part(made, columns, Gap(start, start + len(block), gap.shard), {})
                start += len(block)
                bar.update(len(block))
    writer.finish()


def _mixed(ingredients: Sequence[Ingredient], seed: int) -> Iterator[Row]:
    """The rows of all datasets: each next one is of a dataset drawn by how many of its rows are left."""
    draws = random.Random(seed)
    streams, left = [each.records(seed) for each in ingredients], [each.taken for each in ingredients]
    while sum(left):
        place = draws.randrange(sum(left))
        for number, count in enumerate(left):
            if place < count:
                left[number] -= 1
                yield next(streams[number])
                break
            place -= count


def common_columns(ingredients: Sequence[Ingredient], drop: Sequence[str] = ()) -> dict[str, Any]:
    """Name to `datasets` feature of the columns of all datasets.

    Args:
        ingredients: The datasets.
        drop: Columns to leave out.

    Raises:
        ValueError: No dataset, rows of different forms, or a column with different types.
    """
    if not ingredients:
        raise ValueError("There is nothing to mix. Name one or more datasets.")
    columns: dict[str, Any] = {}
    origins: dict[str, Ingredient] = {}
    for each in ingredients:
        for column, feature in each.features.items():
            feature = List(Image()) if column == "images" else feature
            if column not in drop and columns.setdefault(column, feature) != feature:
                raise ValueError(
                    f"The column {column!r} is {columns[column]} in {origins[column].location!r} and {feature} in "
                    f"{each.location!r}. Convert both in the same way (`image_places` of messages), or drop it."
                )
            origins.setdefault(column, each)
    _check_forms(ingredients)
    return columns


def _check_forms(ingredients: Sequence[Ingredient]) -> None:
    """Refuses supervised rows beside pairs, and whole conversations beside prompts."""
    first = _form(ingredients[0])
    for each in ingredients:
        if _form(each) != first:
            raise ValueError(
                f"The rows of {ingredients[0].location!r} have {first}, those of {each.location!r} {_form(each)}: no "
                "trainer takes both in one dataset. Convert them in the same way (`turns` of conversations)."
            )


def _form(ingredient: Ingredient) -> list[str]:
    return [column for column in FORM if column in ingredient.features]
