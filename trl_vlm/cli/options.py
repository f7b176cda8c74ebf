"""Options and output that several commands share."""

import argparse
import json
import os
import sys
from argparse import SUPPRESS
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_vlm.data.io.source import Source

ROWS = "hub id, folder, .parquet, .json or .jsonl"


class CommandFailed(ValueError):
    """A command cannot continue; its message is for the user."""


def add_input(command: argparse.ArgumentParser, help: str) -> None:
    """Adds `--input`, and the earlier ways to give it (`--dataset`, or the bare location)."""
    group = command.add_mutually_exclusive_group(required=True)
    group.add_argument("--input", help=help)
    group.add_argument("--dataset", dest="input", default=SUPPRESS, help=SUPPRESS)
    group.add_argument("input", nargs="?", default=SUPPRESS, help=SUPPRESS)


def add_output(command: argparse.ArgumentParser) -> None:
    """Adds `--output`, and its earlier name `--out`."""
    group = command.add_mutually_exclusive_group(required=True)
    group.add_argument("--output", help="folder of parquet shards, or a .parquet or .jsonl file")
    group.add_argument("--out", dest="output", default=SUPPRESS, help=SUPPRESS)


def add_source(command: argparse.ArgumentParser) -> None:
    """Options that choose a part of the input."""
    command.add_argument("--split", help="split of a hub dataset or folder; needed if there are several")
    command.add_argument("--config", help="configuration of a hub dataset")
    command.add_argument("--revision", help="branch, tag or commit of a hub dataset")
    command.add_argument("--data-files", help="which files of a hub dataset or folder to read")


def add_push(command: argparse.ArgumentParser, kind: str = "dataset") -> None:
    """Options that upload what was written; `kind` is that of the repository."""
    command.add_argument(
        "--push-to-hub", "--push_to_hub", metavar="OWNER/NAME", help=f"also upload it, with a card, to this {kind}"
    )
    command.add_argument("--private", action="store_true", help=f"make that {kind} private, if it is new")


def source_of(options: argparse.Namespace, location: str) -> "Source":
    """The input that the options describe."""
    from trl_vlm.data.io.source import Source

    return Source(
        location,
        split=options.split,
        config=options.config,
        revision=options.revision,
        data_files=options.data_files,
    )


def join_processes() -> None:
    """Joins the processes that a launcher started.

    Raises:
        ValueError: Accelerate sees fewer processes than were started.
    """
    import torch
    from accelerate import PartialState

    # Without `cpu`, accelerate overlooks them on a machine without GPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise ValueError(
            f"The launcher started {started} processes, and accelerate knows of {state.num_processes}: each would do "
            "all of the work. Start them with `accelerate launch`, or with torchrun."
        )


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def write(report: str | Mapping[str, Any]) -> None:
    """Writes a report to standard output."""
    text = report if isinstance(report, str) else json.dumps(report, indent=2, ensure_ascii=False)
    sys.stdout.write(text + "\n")
