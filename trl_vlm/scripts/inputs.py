"""Checks of the inputs of a run before its first stage: rows, addresses, the folder, disk space."""

import json
import shutil
import socket
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin

from trl_vlm.data.checks import check_dataset
from trl_vlm.data.encoding import encode
from trl_vlm.data.io.dataset import load_rows
from trl_vlm.data.io.source import Source
from trl_vlm.data.named_rows import undecoded
from trl_vlm.data.rows import row_images, supervised_conversation
from trl_vlm.models.downloads import once_per_node

REPLIES = {"dpo": "chosen", "reward": "chosen"}  # what follows the prompt in a first row
CONNECT_SECONDS = 10.0


def rows_of(location: str | None, option: str, *, streaming: bool = False, **choice: Any) -> Dataset | IterableDataset:
    """The rows that an option names.

    Args:
        location: A file, a folder or a hub id.
        option: The option's name, for errors.
        streaming: See `load_rows`.
        choice: Fields of `Source`: `split`, `config`, `revision`, `data_files`.

    Raises:
        ValueError: The option is missing, or what it names cannot be read.
    """
    if not location:
        raise ValueError(f"`--{option}` is missing: a .parquet, .json or .jsonl file, a folder, or a hub id.")
    try:
        with once_per_node():
            return load_rows(Source(location, **choice), streaming=streaming)
    except (ValueError, OSError) as error:
        raise ValueError(f"`--{option}`: {error}") from error


def check_first_row(
    rows: Dataset | IterableDataset,
    purpose: str,
    option: str,
    processor: ProcessorMixin | None = None,
    *,
    columns: Sequence[str] = (),
) -> None:
    """Refuses rows if the first one lacks a column, breaks the row contract, or cannot be encoded.

    Args:
        rows: The rows.
        purpose: A key of `data.checks.PURPOSES`.
        option: The option that names the rows, for errors.
        processor: Encodes the first row, if given.
        columns: Columns of which the first row needs at least one.

    Raises:
        ValueError: The first row is bad; the message names option and column.
    """
    stored = undecoded(rows) if isinstance(rows, Dataset | IterableDataset) else rows
    row = next(iter(stored), None)
    if row is None:
        raise ValueError(f"`--{option}`: there are no rows.")
    if columns and all(row.get(column) is None for column in columns):
        raise ValueError(
            f"`--{option}`: the first row has none of the columns {', '.join(columns)}; it has "
            f"{', '.join(sorted(row))}."
        )
    for problem in check_dataset([row], purpose).problems:
        if not problem.is_warning:
            raise ValueError(f"`--{option}`, row 0, column {problem.column!r}: {problem.reason}")
    if processor is None or not hasattr(processor, "image_processor"):
        return
    reply = row[REPLIES[purpose]] if purpose in REPLIES else []
    conversation = supervised_conversation(row) if purpose == "sft" else [*row["prompt"], *reply]
    try:
        encode(
            processor,
            [conversation],
            [row_images(row, "row 0")],
            add_generation_prompt=purpose == "ppo",
            names=["row 0"],
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"`--{option}`: {error}") from error


def check_folder(folder: str | PathLike, needed_bytes: int = 0) -> None:
    """Refuses a folder that cannot be written to, or has too little space.

    Raises:
        OSError: It is a file, or may not be written to.
        ValueError: There is too little space.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path) as file:
        file.write(b"0")
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(path).free
    if free + there < needed_bytes:
        raise ValueError(
            f"{path} has {free / 1e9:.1f} GB of free space, and checkpoints and model need about "
            f"{needed_bytes / 1e9:.1f} GB. Free some, keep fewer (`--save_total_limit`), or give another folder."
        )


def bytes_to_write(model: str | PathLike, *, adapter: bool, checkpoints: int) -> int:
    """Roughly how many bytes a training run writes: weights and optimizer state of each checkpoint, and the model.

    The result is 0 if the size of the weights is unknown without a download. An adapter counts as a twentieth of its
    base.
    """
    weights = sum(file.stat().st_size for file in _weight_files(model))
    return int((3 * checkpoints + 1) * weights * (0.05 if adapter else 1.0))


def check_model(model: str | PathLike, option: str = "model_name_or_path") -> None:
    """Refuses a path that is neither a folder with a model nor can be a hub id.

    Raises:
        ValueError: The message says what is there.
    """
    path = Path(model)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"`--{option}`: the folder {str(model)!r} holds neither config.json nor adapter_config.json.")
    if not path.exists() and (path.is_absolute() or str(model).count("/") > 1 or str(model).startswith(".")):
        raise ValueError(f"`--{option}`: there is no folder {str(model)!r}, and it cannot be a hub id (owner/name).")


def check_address(address: str, option: str = "judge") -> None:
    """Refuses an address where no server answers. Behind a proxy nothing is checked.

    Raises:
        ValueError: It is no address, or no connection can be made.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"`--{option}`: {address!r} is no address. It begins with http:// or https://.")
    behind_proxy = parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname)
    if behind_proxy:
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(f"`--{option}`: nobody answers at {address} ({error}). Is the server running?") from error


def identity(location: str, rows: Dataset | IterableDataset, **choice: Any) -> Mapping[str, Any]:
    """The identity of a dataset, for `RunFolder`: location, choice, number of rows, size of a file."""
    about = {name: value for name, value in choice.items() if value is not None}
    about |= {"location": str(Path(location).resolve()) if Path(location).exists() else location}
    if isinstance(rows, Dataset):
        about["rows"] = len(rows)
    if Path(location).is_file():
        about["bytes"] = Path(location).stat().st_size
    return json.loads(json.dumps(about))


def _weight_files(model: str | PathLike) -> list[Path]:
    folder = Path(model)
    if not folder.is_dir():
        config = huggingface_hub.try_to_load_from_cache(str(model), "config.json")
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return list(folder.glob("*.safetensors"))
