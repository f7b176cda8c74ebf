"""`trl-vlm check`: what is wrong with a dataset, row by row."""

import argparse
from pathlib import Path
from typing import Any

from trl_vlm.cli.options import ROWS, add_input, add_source, positive, source_of, write
from trl_vlm.data.checks import PURPOSES, CheckReport, check_dataset


def add(command: argparse.ArgumentParser) -> None:
    """Adds the options of `trl-vlm check`."""
    add_input(command, f"rows: {ROWS}")
    command.add_argument("--for", dest="purpose", required=True, choices=PURPOSES, help="what the rows are for")
    add_source(command)
    command.add_argument("--images", help="folder that relative image paths start at")
    command.add_argument("--no-images", action="store_true", help="do not open the images")
    command.add_argument("--limit", type=positive, help="check this many rows at most")
    command.add_argument(
        "--max-problems",
        type=positive,
        default=20,
        help="how many problems to list (default: %(default)s)",
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Checks, and reports; 1 if anything is wrong, or there is no row."""
    from tqdm.auto import tqdm

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
    lines = [
        f"{'warning: ' * problem.is_warning}row {problem.row}, column {problem.column!r}: {problem.reason}"
        for problem in report.problems
    ]
    unlisted = report.counts.total() - len(report.problems)
    if unlisted:
        lines.append(f"... and {unlisted} more problems (--max-problems)")
    lines += [f"{count} x {kind}" for kind, count in report.counts.most_common()]
    verdict = "good"
    if not report.is_good:
        verdict = f"{report.bad_rows} rows are bad" if report.rows else "there are no rows"
    lines.append(f"{report.rows} rows with {report.images} images for {purpose}: {verdict}")
    return "\n".join(lines)
