"""How long `trl-vlm` takes to start: CPU seconds of whole commands, each in a fresh process.

    python -m benchmarks.speed.cli_speed --runs 5 --output docs/results/cli_speed.json

`check` and `convert` read 100 local rows with one small image. `--help` and `--version` are the floor: a Python
interpreter, argparse and the table of commands.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
from PIL import Image

ROWS = 100


def commands(folder: Path) -> dict[str, list[str]]:
    """What is measured, on files that are written into `folder`."""
    picture, rows, records = folder / "0.png", folder / "rows.parquet", folder / "records.json"
    Image.new("RGB", (8, 8), "red").save(picture)
    row = {
        "images": [str(picture)],
        "prompt": [{"role": "user", "content": "What is it?"}],
        "chosen": [{"role": "assistant", "content": "A cup."}],
        "rejected": [{"role": "assistant", "content": "A fork."}],
    }
    parquet.write_table(pyarrow.Table.from_pylist([row] * ROWS), rows)
    record = {"image": str(picture), "question": "What?", "chosen": "A cup.", "rejected": "A fork.", "idx": 0}
    records.write_text(json.dumps([record] * ROWS))
    convert = ["--from", "rlaif-v", "--input", str(records), "--output", str(folder / "out.jsonl"), "--overwrite"]
    return {
        "--version": ["--version"],
        "--help": ["--help"],
        "pairs --help": ["pairs", "--help"],
        "check --help": ["check", "--help"],
        "convert --help": ["convert", "--help"],
        f"check, {ROWS} rows of parquet": ["check", "--input", str(rows), "--for", "dpo"],
        f"convert, {ROWS} records of JSON": ["convert", *convert],
        "pairs bdhs --help": ["pairs", "bdhs", "--help"],
    }


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds of one run of the command, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "trl_vlm.cli", *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(results: dict[str, list[float]]) -> str:
    """The results for people."""
    lines = [
        "# Start-up of the command line",
        "",
        f"CPU seconds of whole commands, each in a fresh process: median of {len(next(iter(results.values())))} runs "
        f"(least to most). Python {platform.python_version()}, {platform.machine()}. "
        "`python -m benchmarks.speed.cli_speed --runs 5 --output docs/results/cli_speed.json`",
        "",
        "| `trl-vlm ...` | CPU seconds |",
        "|---|---|",
    ]
    for name, seconds in results.items():
        lines.append(f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |")
    text = "\n\nA command imports its own code alone. `check` and `convert` load `datasets`, and neither torch nor"
    return "\n".join(lines) + text + "\ntransformers nor TRL; the methods of `pairs` load all of them, for a model.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        named = commands(Path(folder))
        results = {name: [cpu_seconds(given) for _ in range(args.runs)] for name, given in named.items()}
    sys.stdout.write(table(results))
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
