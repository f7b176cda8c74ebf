"""A written dataset on the hub: shards that hold their images, and a card. No folder of this machine is named."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import yaml
from datasets import Features
from huggingface_hub import HfApi

from trl_vlm.data.io.card import TAGS
from trl_vlm.data.io.image_files import stored_image
from trl_vlm.data.io.output import STATE_FILE
from trl_vlm.data.io.progress import Progress, blocks_of
from trl_vlm.data.io.shards import IMAGES, features_of, write_parquet
from trl_vlm.data.io.source import Source

SHARD_ROWS = 1000
IMAGE_LISTS = ("images", "rejected_images")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def create_repository(repo: str, kind: str = "dataset", *, private: bool = False) -> None:
    """Makes a repository where there is none, so that a missing right shows before the work begins.

    Args:
        repo: Its hub id.
        kind: "dataset" or "model".
        private: Whether a new one is private.

    Raises:
        ValueError: The hub refuses; the message has the reason and the remedy.
    """
    try:
        HfApi().create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The hub does not take the {kind} {repo!r}: {error}. Log in with `hf auth login` or set HF_TOKEN, and "
            "give an owner/name that you may write to."
        ) from error


def push_dataset(repo: str, splits: Mapping[str, Path], card: str) -> str:
    """Uploads datasets that were written here as the splits of one, in one commit; returns its address.

    Args:
        repo: Hub id of the dataset; it exists.
        splits: Split to what was written: a folder of shards, or a .parquet or .jsonl file.
        card: Markdown that goes before the columns and the way to load.

    Raises:
        BadRecord: An image is not there any more.
        OSError: The hub refuses.
    """
    with TemporaryDirectory() as folder:
        root = Path(folder)
        features = [_write_shards(path, root / "data", split) for split, path in splits.items()]
        (root / "README.md").write_text(_card(repo, splits, card, features[0]), encoding="utf-8")
        message = "Upload with trl-vlm"
        options = {"repo_id": repo, "repo_type": "dataset", "commit_message": message, "delete_patterns": ["data/*"]}
        return str(HfApi().upload_folder(folder_path=folder, **options))


def progress_of(output: Path) -> Progress:
    """The settings that a written dataset was made with, and what was read, written and left out."""
    return Progress.read(output / STATE_FILE if output.is_dir() else output.with_name(f".{output.name}{STATE_FILE}"))


def without_folders(text: str, settings: Mapping[str, Any]) -> str:
    """A text that holds settings as JSON, with the name alone of each file and folder of this machine."""
    for path in sorted(_paths(settings), key=len, reverse=True):
        text = text.replace(json.dumps(path, ensure_ascii=False)[1:-1], Path(path).name)
    return text


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _paths(part)
    elif isinstance(value, str) and Path(value).is_absolute():
        yield value


def _write_shards(output: Path, folder: Path, split: str) -> Features:
    """Writes what lies at `output` as shards that hold their images; returns the features."""
    folder.mkdir(exist_ok=True)
    features = _features(output)
    count = 0
    for number, rows in enumerate(blocks_of(Source(str(output)).records(), SHARD_ROWS)):
        embedded = [_with_images(row, features) for row in rows]
        table = pyarrow.Table.from_pylist(embedded, schema=features.arrow_schema)
        write_parquet(table, folder / f"{split}-{number:05d}.parquet")
        count += len(rows)
    if not count:
        raise ValueError(f"{str(output)!r} holds no row: there is nothing to upload.")
    return features


def _features(output: Path) -> Features:
    """The features of a written dataset; those of JSON Lines follow from their values."""
    if output.suffix == ".jsonl":
        rows = list(Source(str(output)).records())
        found = features_of(rows)
        return Features({**found, **{name: IMAGES for name in IMAGE_LISTS if name in found}})
    shard = output if output.is_file() else sorted(output.glob("train-*.parquet"))
    if not shard:  # a folder of JSON Lines has no schema
        raise ValueError(f"{str(output)!r} holds no parquet shard.")
    return Features.from_arrow_schema(parquet.read_schema(shard if isinstance(shard, Path) else shard[0]))


def _with_images(row: Mapping[str, Any], features: Features) -> dict[str, Any]:
    images = {name: row[name] for name in IMAGE_LISTS if name in features and row.get(name) is not None}
    return {**row, **{name: [stored_image(image, embed=True) for image in value] for name, value in images.items()}}


def _card(repo: str, splits: Iterable[str], text: str, features: Features) -> str:
    """The card as the hub reads it: what it says of itself, the text, the columns, and how to load."""
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    about = {"tags": list(TAGS), "configs": [{"config_name": "default", "data_files": files}]}
    columns = [f"| `{name}` | {_kind(feature)} |" for name, feature in features.items()]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(about, sort_keys=False).strip(),
            "---",
            "",
            _FRONT_MATTER.sub("", text).strip(),
            "",
            "## Columns",
            "",
            "| column | type |",
            "|---|---|",
            *columns,
            "",
            "## How to load",
            "",
            "```python",
            "from datasets import load_dataset",
            "",
            *(f'{split} = load_dataset("{repo}", split="{split}")' for split in splits),
            "```",
            "",
            "The trainers of [TRL](https://github.com/huggingface/trl) and of trl_vlm read these rows as they are.",
            "",
        ]
    )


def _kind(feature: Any) -> str:
    """A feature in a few words."""
    if isinstance(feature, dict):
        return f"{{{', '.join(feature)}}}"
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return f"list of {_kind(inner)}"
    return getattr(feature, "dtype", None) or type(feature).__name__.lower()
