"""The Fact-RLHF example over several seeds, each from scratch: what PPO with and without facts changes, with spread.

    python -m benchmarks.studies.fact_rlhf_seeds --seeds 0 1 2

Runs `examples/fact_rlhf.py` once per seed (about ten minutes each on two cores; finished stages are skipped) and
writes `fact_rlhf.md` and the report `fact_rlhf/` into `--results_dir`. The evaluation scenes of each
seed are its own, and none was used to choose a setting.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from trl_vlm.evaluation import Arm, write_report

EXAMPLE = Path(__file__).parents[2] / "examples" / "fact_rlhf.py"
SPLITS = ("adv, greedy", "adv, sampled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/fact_rlhf"), help="Models of the single runs.")
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"), help="Where the tables go.")
    options, example_options = parser.parse_known_args()
    reports = [
        run([str(EXAMPLE)], seed, options.output_dir / f"seed{seed}", example_options) for seed in options.seeds
    ]
    write_report(
        options.results_dir / "fact_rlhf",
        [combined(runs) for runs in zip(*(report["arms"] for report in reports), strict=True)],
        title="Fact-RLHF on the testbed",
        notes=[
            f"{len(reports)} runs from scratch, seeds {', '.join(map(str, options.seeds))}; mean ± standard deviation",
            *reports[0]["notes"][1:],
            "`python -m benchmarks.studies.fact_rlhf_seeds`; training curves are those of the first seed",
        ],
    )
    (options.results_dir / "fact_rlhf.md").write_text(by_seed(reports, options.seeds))


def run(program: list[str], seed: int, folder: Path, example_options: list[str]) -> dict:
    """The report of an example or a study for one seed, from an earlier call if it is there."""
    path = folder / "report" / "report.json"
    if not path.exists():
        command = [sys.executable, *program, "--seed", str(seed), "--output_dir", str(folder), *example_options]
        subprocess.run(command, check=True)
    return json.loads(path.read_text())


def combined(arms: tuple[dict, ...]) -> Arm:
    """One arm with a list of values per metric, one for each seed."""
    first = arms[0]
    metrics = {
        split: {name: [arm["metrics"][split][name] for arm in arms] for name in values}
        for split, values in first["metrics"].items()
    }
    return Arm(first["name"], metrics, first["history"])


def by_seed(reports: list[dict], seeds: list[int]) -> str:
    """What PPO changes on each seed, in percentage points against its own supervised model."""
    lines = [
        "# PPO against the supervised model, seed by seed",
        "",
        "Testbed, scenes in which partners are mostly absent (`adv`). Everything in percent, changes in percentage "
        "points. `python -m benchmarks.studies.fact_rlhf_seeds`; all metrics: [fact_rlhf](fact_rlhf/report.md).",
        "",
        "| captions | arm | seed | CHAIR_i before | CHAIR_i after | change | recall | change | repeats |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for split in SPLITS:
        for place, arm in enumerate(reports[0]["arms"][1:], start=1):
            changes = []
            for seed, report in zip(seeds, reports, strict=True):
                before, after = report["arms"][0]["metrics"][split], report["arms"][place]["metrics"][split]
                chair, recall = (100 * (after[key] - before[key]) for key in ("chair_i", "recall"))
                changes.append((chair, recall))
                lines.append(
                    f"| {split.split(', ')[1]} | {arm['name']} | {seed} | {100 * before['chair_i']:.1f} | "
                    f"{100 * after['chair_i']:.1f} | {chair:+.1f} | {100 * after['recall']:.1f} | {recall:+.1f} | "
                    f"{100 * after['repeats']:.1f} |"
                )
            means = [statistics.mean(values) for values in zip(*changes, strict=True)]
            lines.append(
                f"| {split.split(', ')[1]} | {arm['name']} | mean | | | {means[0]:+.1f} | | {means[1]:+.1f} | |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
