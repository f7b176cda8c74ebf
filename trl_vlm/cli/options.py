"""Options and output that several commands share."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from trl_vlm.data.converters import Source


def add_source(command: argparse.ArgumentParser) -> None:
    """Options that say which part of the input is meant."""
    command.add_argument("--split", help="split of a hub data set or folder; needed if there are several")
    command.add_argument("--config", help="configuration of a hub data set")
    command.add_argument("--revision", help="branch, tag or commit of a hub data set")
    command.add_argument("--data-files", help="which files of a hub data set or folder to read")


def source_of(options: argparse.Namespace, location: str) -> Source:
    """The input that the options describe."""
    return Source(
        location,
        split=options.split,
        config=options.config,
        revision=options.revision,
        data_files=options.data_files,
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
