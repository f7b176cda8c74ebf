"""Downloads of a run on several processes: once for all that share a disk, and not on each of them at once."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from trl_vlm.models.loading import base_of

_FILES = (
    *(CONFIG_NAME, GENERATION_CONFIG_NAME),
    *("adapter_model.safetensors", SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
)
# What is not there, or cannot be asked for without a network, is left to `from_pretrained`.
_IF_THERE: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


@contextmanager
def once_per_node() -> Iterator[None]:
    """A context that the main process enters first, then the first process of each node, then all others.

    What the main process downloads, the others find where nodes share the folder of the hub; where they do not, each
    node downloads it once. Every process must come here.
    """
    if _is_alone():
        yield
        return
    # Without `cpu`, accelerate overlooks the processes on a machine without GPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.main_process_first(), state.local_main_process_first():
        yield


def fetch_weights(places: Mapping[str, Mapping[str, str]]) -> None:
    """Downloads the weights of models before all processes load them; one process alone downloads when it loads.

    Args:
        places: Folders or hub ids, each with where files come from (`revision`, ...).
    """
    if _is_alone():
        return
    with once_per_node():
        for path, hub in places.items():
            download_weights(path, **hub)


def download_weights(path: str | os.PathLike, **hub: Any) -> None:
    """Downloads the weights of a hub id, and those of an adapter's base; of a folder nothing but the latter.

    Args:
        path: Folder or hub id.
        hub: Where files come from (`revision`, ...).
    """
    if not Path(path).is_dir():
        found = {name: cached_file(str(path), name, **_IF_THERE, **hub) for name in _FILES}
        index = found[SAFE_WEIGHTS_INDEX_NAME]
        if index is not None:
            get_checkpoint_shard_files(str(path), index, **hub)
    base = base_of(path, **hub)
    if base is not None:
        download_weights(base)


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1
