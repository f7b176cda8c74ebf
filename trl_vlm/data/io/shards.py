"""The shards of a dataset that is being written: one schema for all, and their columns one after another."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
from datasets import Features, Image, List

from trl_vlm.data.faults import IMAGE_COLUMNS
from trl_vlm.data.io.atomic import whole

IMAGES = List(Image())


def write_parquet(table: pyarrow.Table, file: Path) -> None:
    """Writes a table with checksums, by which `fault_of` finds damage."""
    parquet.write_table(table, file, write_page_checksum=True)


def fault_of(file: Path, rows: int) -> str:
    """What is wrong with a file that should hold `rows` rows, read from beginning to end; "" if nothing is."""
    if not file.is_file():
        return f"{str(file)!r} is gone"
    try:
        found = _rows_of_json_lines(file) if file.suffix == ".jsonl" else _rows_of_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        return f"{str(file)!r} is damaged ({' '.join(str(error).split())[:200]})"
    return "" if found == rows else f"{str(file)!r} holds {found} rows, and {rows} were written to it"


def _rows_of_parquet(file: Path) -> int:
    with parquet.ParquetFile(file, page_checksum_verification=True) as table:
        return sum(len(batch) for batch in table.iter_batches(batch_size=64))


def _rows_of_json_lines(file: Path) -> int:
    with file.open(encoding="utf-8") as lines:
        return sum(isinstance(json.loads(line), dict) for line in lines)


def give_one_schema(folder: Path) -> None:
    """Rewrites the parquet shards whose columns differ, so that all have the same columns of the same types.

    Types are inferred from the values of a shard: a column may be null in one and text in the next, or missing. Each
    shard is replaced atomically, so that a run that dies here can do it again.

    Raises:
        ValueError: A column has values of several kinds.
    """
    shards = sorted(folder.glob("train-*.parquet"))
    schemas = [parquet.read_schema(shard) for shard in shards]
    if all(schema.equals(schemas[0], check_metadata=True) for schema in schemas):
        return
    try:
        common = pyarrow.unify_schemas([schema.remove_metadata() for schema in schemas], promote_options="permissive")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(
            f"The shards in {str(folder)!r} hold columns of several kinds ({error}). Give all rows of the dataset "
            "the same kind of value in each column."
        ) from error
    known = {name: feature for schema in schemas for name, feature in Features.from_arrow_schema(schema).items()}
    features = Features.from_arrow_schema(common)
    features["images"] = known["images"]
    for shard, schema in zip(shards, schemas, strict=True):
        if not schema.equals(features.arrow_schema, check_metadata=True):
            table = _with_columns(parquet.read_table(shard), features.arrow_schema)
            with whole(shard) as unfinished:
                write_parquet(table, unfinished)


def _with_columns(table: pyarrow.Table, schema: pyarrow.Schema) -> pyarrow.Table:
    """The table with exactly the columns of `schema`, null where it had none."""
    arrays = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pyarrow.nulls(len(table), field.type)
        for field in schema
    ]
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def read_columns(folder: Path, wanted: Sequence[str], prefix: str) -> Iterator[dict[str, Any]]:
    """The rows of all shards, with the requested columns and those that begin with `prefix`."""

    def is_wanted(name: str) -> bool:
        return name in wanted or name.startswith(prefix)

    for shard in sorted(folder.glob("train-*")):
        if shard.suffix == ".jsonl":
            with shard.open(encoding="utf-8") as lines:
                for line in lines:
                    yield {name: value for name, value in json.loads(line).items() if is_wanted(name)}
        elif shard.suffix == ".parquet":
            names = [name for name in parquet.read_schema(shard).names if is_wanted(name)]
            yield from parquet.read_table(shard, columns=names).to_pylist()


def features_of(rows: Sequence[Mapping[str, Any]]) -> Features:
    """The features of rows, inferred from their values; a column without any value is null.

    Raises:
        ValueError: A column holds values of several kinds.
    """
    columns = dict.fromkeys(column for row in rows for column in row if column not in IMAGE_COLUMNS)
    arrays = {}
    for column in columns:
        try:
            arrays[column] = pyarrow.array([row.get(column) for row in rows])
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(
                f"The column {column!r} holds values of several kinds ({error}). Give all rows the same: messages "
                "whose content is a string, or messages whose content is a list of parts."
            ) from error
    found = Features.from_arrow_schema(pyarrow.table(arrays).schema)
    return Features({"images": IMAGES, **found})
