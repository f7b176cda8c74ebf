"""`trl-vlm convert`, `trl-vlm check` and `trl-vlm pairs`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trl_vlm.cli.options import add_source, positive, source_of, write
from trl_vlm.cli.pairs import add_pairs
from trl_vlm.data.checks import PURPOSES, CheckReport, check_dataset
from trl_vlm.data.converters import CONVERTERS, Report, convert
from trl_vlm.data.converters.vlfeedback import ASPECTS, PAIRS
from trl_vlm.judges import SpendingCapReached

# Options of single converters: name -> arguments of argparse.
CONVERTER_OPTIONS = {
    "pairs": {"choices": PAIRS, "help": "vlfeedback: which pairs of a record to take (default: all)"},
    "min_gap": {"type": float, "help": "vlfeedback: drop pairs whose mean ratings differ by less"},
    "aspects": {"nargs": "+", "choices": ASPECTS, "help": "vlfeedback: which ratings count (default: all three)"},
    "image_column": {"help": "nlf: column of the COCO image id or file name"},
    "question_column": {"help": "nlf: column of the question"},
    "refined_column": {"help": "nlf: column of the reply after feedback (chosen)"},
    "initial_column": {"help": "nlf: column of the reply before feedback (rejected)"},
    "critique_column": {"help": "nlf: column of the feedback, kept as `critique`"},
    "score_column": {"help": "nlf: column of the rating, kept as `score`"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 1 if something is wrong.

    Args:
        arguments: What follows the program's name; `sys.argv` if None.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "httpx2"):  # a line for every request
        logging.getLogger(library).setLevel(logging.WARNING)
    options = parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError, SpendingCapReached) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="trl-vlm", description="Data tools of trl_vlm.")
    commands = top.add_subparsers(required=True, metavar="command")
    add_convert(commands.add_parser("convert", help="convert a public data set to rows that the trainers read"))
    add_check(commands.add_parser("check", help="check a data set row by row; exit code 1 if anything is wrong"))
    add_pairs(commands.add_parser("pairs", help="make preference pairs with a model"))
    return top


def add_convert(command: argparse.ArgumentParser) -> None:
    """`trl-vlm convert`."""
    command.set_defaults(command=run_convert)
    command.add_argument("--from", dest="name", required=True, choices=CONVERTERS, help="which data set it is")
    command.add_argument("--input", help="hub id, folder, .parquet, .json or .jsonl (default: the data set's hub id)")
    command.add_argument("--output", required=True, help="folder of parquet shards, or a .parquet or .jsonl file")
    add_source(command)
    command.add_argument("--images", help="folder of the image files that the records name")
    command.add_argument("--facts", help="image_to_caption.json of zhiqings/LLaVA-RLHF-Data")
    command.add_argument("--embed-images", action="store_true", help="store image files' bytes instead of their paths")
    command.add_argument("--skip-bad", action="store_true", help="leave out and count records that make no row")
    command.add_argument("--overwrite", action="store_true", help="replace the output, forget an unfinished one")
    command.add_argument("--limit", type=positive, help="read this many records at most")
    command.add_argument("--shard-records", type=positive, default=500, help="records between two savings")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    for name, settings in CONVERTER_OPTIONS.items():
        command.add_argument(f"--{name.replace('_', '-')}", **settings)


def add_check(command: argparse.ArgumentParser) -> None:
    """`trl-vlm check`."""
    command.set_defaults(command=run_check)
    command.add_argument("input", help="hub id, folder, .parquet, .json or .jsonl")
    command.add_argument("--for", dest="purpose", required=True, choices=PURPOSES, help="what the rows are for")
    add_source(command)
    command.add_argument("--images", help="folder that relative image paths start at")
    command.add_argument("--no-images", action="store_true", help="do not open the images")
    command.add_argument("--limit", type=positive, help="check this many rows at most")
    command.add_argument("--max-problems", type=positive, default=20, help="list this many problems; all are counted")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def run_convert(options: argparse.Namespace) -> int:
    """Converts, and reports what was read, written and left out."""
    given = {name: getattr(options, name) for name in CONVERTER_OPTIONS if getattr(options, name) is not None}
    report = convert(
        options.name,
        source_of(options, options.input or CONVERTERS[options.name].hub_id),
        options.output,
        images=options.images,
        facts=options.facts,
        embed_images=options.embed_images,
        skip_bad=options.skip_bad,
        overwrite=options.overwrite,
        limit=options.limit,
        shard_records=options.shard_records,
        **given,
    )
    write(asdict(report) if options.json else conversion_text(report))
    return 0


def conversion_text(report: Report) -> str:
    """The report for people."""
    lines = [f"{report.records} records -> {report.rows} rows in {report.output}"]
    lines += [f"left out, {reason}: {count}" for reason, count in sorted(report.dropped.items())]
    return "\n".join(lines)


def run_check(options: argparse.Namespace) -> int:
    """Checks, and reports; 1 if anything is wrong, or there is no row."""
    source = source_of(options, options.input)
    rows = tqdm(source.records(limit=options.limit), total=source.total, unit="row", disable=None)
    report = check_dataset(
        rows,
        options.purpose,
        load_images=not options.no_images,
        images=Path(options.images) if options.images else None,
        max_problems=options.max_problems,
    )
    write(check_json(report) if options.json else check_text(report, options.purpose))
    return 0 if report.is_good else 1


def check_json(report: CheckReport) -> dict[str, Any]:
    """The report for programs."""
    return {
        "good": report.is_good,
        "rows": report.rows,
        "bad_rows": report.bad_rows,
        "images": report.images,
        "counts": dict(report.counts),
        "problems": [problem._asdict() for problem in report.problems],
    }


def check_text(report: CheckReport, purpose: str) -> str:
    """The report for people."""
    lines = [f"row {problem.row}, column {problem.column!r}: {problem.reason}" for problem in report.problems]
    unlisted = report.counts.total() - len(report.problems)
    if unlisted:
        lines.append(f"... and {unlisted} more problems (--max-problems)")
    lines += [f"{count} x {kind}" for kind, count in report.counts.most_common()]
    verdict = (
        "good" if report.is_good else "there are no rows" if not report.rows else f"{report.bad_rows} rows are bad"
    )
    lines.append(f"{report.rows} rows with {report.images} images for {purpose}: {verdict}")
    return "\n".join(lines)
