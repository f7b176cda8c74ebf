"""`trl-vlm check`: what is wrong with a dataset, row by row."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_vlm.cli.options import ROWS, CommandFailed, add_input, add_source, positive, source_of, write
from trl_vlm.data.checks import PURPOSES, CheckReport, check_dataset

if TYPE_CHECKING:
    from trl_vlm.data.model_check import ModelCheck, Spread

SHOWN_TOKENS = 12


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
    command.add_argument("--model", help="vision-language model (hub id or folder) whose processor reads the rows")
    command.add_argument("--max-length", type=positive, help="with --model: a row with more tokens is bad")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Checks and reports; returns 1 if anything is wrong, or there is no row."""
    from tqdm.auto import tqdm

    model = _model_check(options)
    source = source_of(options, options.input)
    rows = tqdm(source.records(limit=options.limit), total=source.total, unit="row", disable=None)
    report = check_dataset(
        rows,
        options.purpose,
        load_images=not options.no_images,
        images=Path(options.images) if options.images else None,
        max_problems=options.max_problems,
        **({} if model is None else {"control_tokens": model.control_tokens, "further": model}),
    )
    if options.json:
        write(check_json(report) | ({} if model is None else {"model": model_json(model)}))
    else:
        write("\n".join([*([] if model is None else model_lines(model)), check_text(report, options.purpose)]))
    return 0 if report.is_good else 1


def _model_check(options: argparse.Namespace) -> "ModelCheck | None":
    """The check with a model; None if none is given, and then nothing heavy is imported."""
    if options.model is None:
        if options.max_length is not None:
            raise CommandFailed("--max-length needs --model: how many tokens a row has depends on the processor.")
        return None
    if options.no_images:
        raise CommandFailed("--model cannot be combined with --no-images: images decide how many tokens a row has.")
    from trl_vlm.data.model_check import ModelCheck

    images = Path(options.images) if options.images else None
    return ModelCheck(options.model, options.purpose, options.max_length, images)


def model_json(model: "ModelCheck") -> dict[str, Any]:
    """The results of the check with a model, for programs."""

    def spread(found: "Spread | None") -> dict[str, float] | None:
        return None if found is None else found._asdict()

    return {
        "path": model.path,
        "processor": type(model.processor).__name__,
        "reply_end": model.end or model.processor.tokenizer.eos_token,
        "reply_end_is_appended": model.end is None,
        "tokens_per_row": spread(model.tokens_per_row),
        "image_tokens_per_row": spread(model.image_tokens_per_row),
        "too_long_rows": model.too_long,
        "refused_rows": model.refused,
        "control_tokens": list(model.control_tokens),
    }


def model_lines(model: "ModelCheck") -> list[str]:
    """The results of the check with a model, for people."""
    tokens = model.control_tokens
    more = f" and {len(tokens) - SHOWN_TOKENS} more" if len(tokens) > SHOWN_TOKENS else ""
    lines = [f"{model.path} ({type(model.processor).__name__})", f"end of a reply: {model.about_end}"]
    if model.tokens_per_row is not None and model.image_tokens_per_row is not None:
        for name, found in (("image tokens", model.image_tokens_per_row), ("tokens", model.tokens_per_row)):
            lines.append(
                f"{name} per row: {found.least} at least, {found.median:g} in the median, {found.most} at most"
            )
    if model.max_length is not None:
        lines.append(f"rows with more than {model.max_length} tokens: {model.too_long}")
    lines.append(f"rows whose placeholders and images differ, or that the processor refuses: {model.refused}")
    return [*lines, f"control tokens: {' '.join(tokens[:SHOWN_TOKENS])}{more}"]


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
