"""A data set written shard by shard beside its destination, and moved there when it is whole.

While it is being written, `<output>.partial/` holds the finished shards and `.conversion.json`, the state that the
next run goes on from. Whatever moment a run dies at, the destination is absent or complete.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
from datasets import Features

STATE_FILE = ".conversion.json"  # hidden, so that `load_dataset` on a finished folder passes it over
SUFFIXES = (".parquet", ".jsonl")
OTHER_SUFFIXES = (".json", ".csv", ".tsv", ".arrow", ".txt", ".gz", ".zip")


@dataclass
class Progress:
    """How far a conversion is.

    Args:
        identity: What was asked for; a run goes on only where this is the same.
        records: Records read.
        rows: Rows written.
        dropped: What made no row, by reason.
        shards: Shards written.
        columns: Columns of the rows, known once there is one.
    """

    identity: dict[str, Any]
    records: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    columns: list[str] = field(default_factory=list)


class Output:
    """Where a conversion writes: a folder of parquet shards, one `.parquet`, or one `.jsonl`.

    Images that are bytes go into the parquet file; beside JSON Lines they become files in `<name>_images/`.

    Args:
        destination: The folder or file. It must not exist, unless `overwrite`.
        identity: What is being converted, and how; must be JSON.
        overwrite: Replace a finished data set, and forget an unfinished one.
    """

    def __init__(self, destination: Path, identity: Mapping[str, Any], *, overwrite: bool = False):
        if destination.suffix in OTHER_SUFFIXES:
            raise ValueError(
                f"The output {str(destination)!r} cannot be written as {destination.suffix}. "
                f"Give a folder, or a file that ends in {' or '.join(SUFFIXES)}."
            )
        if destination.exists() and not overwrite:
            raise FileExistsError(f"{str(destination)!r} exists. Choose another output, or pass `overwrite`.")
        if destination.is_dir() and not (destination / STATE_FILE).is_file():
            raise FileExistsError(
                f"{str(destination)!r} is a folder that no conversion has written; it is not replaced. "
                "Choose another output, or delete it yourself."
            )
        self.destination = destination
        self.partial = destination.with_name(destination.name + ".partial")
        self.images = destination.with_name(destination.stem + "_images")
        self.is_file = destination.suffix in SUFFIXES
        self.as_json = destination.suffix == ".jsonl"
        if overwrite and self.partial.exists():
            shutil.rmtree(self.partial)
        self.progress = self._progress(json.loads(json.dumps(identity)))

    def _progress(self, identity: dict[str, Any]) -> Progress:
        """The state that an earlier run left, or a fresh one."""
        state = self.partial / STATE_FILE
        if not state.is_file():
            return Progress(identity)
        earlier = json.loads(state.read_text(encoding="utf-8"))
        if earlier["identity"] != identity:
            names = earlier["identity"].keys() | identity.keys()
            changed = sorted(name for name in names if earlier["identity"].get(name) != identity.get(name))
            raise ValueError(
                f"{str(self.partial)!r} holds an unfinished conversion that differs in {changed}. Repeat that "
                "command to finish it, or pass `overwrite` to forget it."
            )
        return Progress(**{**earlier, "dropped": Counter(earlier["dropped"])})

    def write_shard(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> None:
        """Writes `rows` and then the state; `self.progress` must count them already, `shards` excepted.

        Args:
            rows: Images are `{"bytes", "path"}`.
            columns: Name to `datasets` feature.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        if rows:
            shard = self.partial / f"train-{self.progress.shards:05d}{'.jsonl' if self.as_json else '.parquet'}"
            unfinished = shard.with_suffix(".tmp")
            if self.as_json:
                lines = (json.dumps(self._with_image_files(row), ensure_ascii=False) + "\n" for row in rows)
                unfinished.write_text("".join(lines), encoding="utf-8")
            else:
                table = pyarrow.Table.from_pylist(list(rows), schema=Features(columns).arrow_schema)
                parquet.write_table(table, unfinished)
            os.replace(unfinished, shard)
            self.progress.shards += 1
        unfinished = self.partial / (STATE_FILE + ".tmp")
        unfinished.write_text(json.dumps(vars(self.progress), indent=2), encoding="utf-8")
        os.replace(unfinished, self.partial / STATE_FILE)

    def finish(self) -> None:
        """Moves the data set to its destination, in one step that happens or does not."""
        for unfinished in self.partial.glob("*.tmp"):
            unfinished.unlink()
        if self.is_file:
            whole = self.destination.with_name(self.destination.name + ".tmp")
            self._merge(whole)
            os.replace(whole, self.destination)
            shutil.rmtree(self.partial)
            return
        replaced = self.destination.with_name(self.destination.name + ".replaced")
        if self.destination.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.destination, replaced)
        os.replace(self.partial, self.destination)
        shutil.rmtree(replaced, ignore_errors=True)

    def _merge(self, whole: Path) -> None:
        """All shards as one file."""
        shards = sorted(self.partial.glob("train-*"))
        if self.as_json:
            with whole.open("wb") as file:
                for shard in shards:
                    with shard.open("rb") as part:
                        shutil.copyfileobj(part, file)
            return
        with parquet.ParquetWriter(whole, parquet.read_schema(shards[0])) as writer:
            for shard in shards:
                writer.write_table(parquet.read_table(shard))

    def _with_image_files(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with paths for images; bytes are written to a file named by their content, once."""
        return {**row, "images": [self._image_file(image) for image in row["images"]]}

    def _image_file(self, image: Mapping[str, Any]) -> str:
        if image["bytes"] is None:
            return image["path"]
        digest = hashlib.sha256(image["bytes"]).hexdigest()[:24]
        suffix = Path(image["path"] or "").suffix or ".img"
        file = self.images / f"{digest}{suffix}"
        if not file.exists():
            self.images.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(file.name + ".tmp")
            unfinished.write_bytes(image["bytes"])
            os.replace(unfinished, file)
        return str(file.resolve())
