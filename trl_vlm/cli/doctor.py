"""`trl-vlm doctor`: what there is to train with, and whether a model behaves as the trainers assume."""

import argparse
import json
from pathlib import Path

from trl_vlm.cli.options import write

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add(command: argparse.ArgumentParser) -> None:
    """Adds the options of `trl-vlm doctor`."""
    command.add_argument(
        "model",
        nargs="?",
        help="generative model, reward model, or adapter of either (folder or hub id); without it the machine alone",
    )
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    command.add_argument("--device", help="where to compute (default: an accelerator, if there is one)")
    command.add_argument("--output-dir", default="outputs", help="where a training will write (default: %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the report there as JSON, too")


def run(options: argparse.Namespace) -> int:
    """Prints the report; returns 1 if something differs from what it must be."""
    from trl_vlm.data.io.atomic import write_whole
    from trl_vlm.doctor.findings import anything_differs, as_json, as_text
    from trl_vlm.doctor.report import about_machine, about_model

    sections = dict(about_machine(options.output_dir))
    if options.model is not None:
        sections |= about_model(options.model, dtype=options.dtype, device=options.device)
    write(as_text(sections))
    if options.json is not None:
        write_whole(options.json, json.dumps(as_json(sections), indent=2, ensure_ascii=False) + "\n")
    return 1 if anything_differs(sections) else 0
