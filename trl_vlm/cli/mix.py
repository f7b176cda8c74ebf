"""`trl-vlm mix`: several converted datasets as one."""

import argparse
from dataclasses import asdict

from trl_vlm.cli.options import add_output, positive, write


def add(command: argparse.ArgumentParser) -> None:
    """Adds the options of `trl-vlm mix`."""
    command.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="DATASET[=WEIGHT]",
        help="parquet files or folders of them; weight 2 takes every row twice, 0.5 a half of them (default: 1)",
    )
    add_output(command)
    command.add_argument("--seed", type=int, default=0, help="of the order and of what is drawn (default: 0)")
    command.add_argument("--drop", nargs="+", default=[], metavar="COLUMN", help="columns to leave out")
    command.add_argument("--overwrite", action="store_true", help="replace the output, or discard an unfinished one")
    command.add_argument("--shard-rows", type=positive, default=500, help="rows between saves (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Mixes, and reports how many rows there are of each dataset."""
    from trl_vlm.data.mixing import Ingredient, mix

    report = mix(
        [Ingredient(*location_and_weight(text)) for text in options.input],
        options.output,
        seed=options.seed,
        drop=options.drop,
        overwrite=options.overwrite,
        shard_rows=options.shard_rows,
    )
    done = ", done already" if report.was_done else ""
    lines = [f"{report.rows} rows in {report.output}{done}"]
    lines += [f"{count} of {location}" for location, count in report.taken.items()]
    write(asdict(report) if options.json else "\n".join(lines))
    return 0


def location_and_weight(text: str) -> tuple[str, float]:
    """`data/vqa=0.5` as a location and a weight, which is 1 where there is none."""
    location, _, weight = text.rpartition("=")
    try:
        return (location, float(weight)) if location else (text, 1.0)
    except ValueError:  # a file whose name has the sign
        return text, 1.0
