"""What each arm of a preference study changes on the testbed, over several seeds from scratch.

    python -m benchmarks.studies.preference_seeds dense_dpo
    python -m benchmarks.studies.preference_seeds bdhs
    python -m benchmarks.studies.preference_seeds online_dpo

Runs the study once per seed (finished trainings are not repeated) and writes `<name>.md` and the report `<name>/`
into `--results_dir`. Options that are not known here go to the study. In every seed, each arm keeps the
learning rate that is best on a development split and is evaluated once on other scenes.
"""

import argparse
from pathlib import Path
from statistics import mean, pstdev

from benchmarks.studies.fact_rlhf_seeds import combined, run
from trl_vlm.evaluation import write_report

TITLES = {"dense_dpo": "Dense DPO", "bdhs": "BDHS", "online_dpo": "Online DPO"}
SHOWN = {"chair_i": "CHAIR_i", "recall": "recall", "repeats": "repeats"}
SPLITS = ("adv, greedy", "adv, sampled", "iid, sampled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=TITLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, help="Models of the single runs (default: runs/<study>).")
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"), help="Where the tables go.")
    options, study_options = parser.parse_known_args()
    name, folder = options.study, options.output_dir or Path("runs", options.study)
    reports = [
        run(["-m", f"benchmarks.studies.{name}"], seed, folder / f"seed{seed}", study_options)
        for seed in options.seeds
    ]
    command = f"`python -m benchmarks.studies.preference_seeds {name}`"
    for report in reports:
        for arm in report["arms"]:
            arm["title"], _, arm["rate"] = arm["name"].partition(", lr ")
    arms = [combined(runs) for runs in zip(*(report["arms"] for report in reports), strict=True)]
    for arm, first in zip(arms, reports[0]["arms"], strict=True):
        arm.name = first["title"]
    notes = [f"{len(reports)} runs from scratch, seeds {', '.join(map(str, options.seeds))}", *reports[0]["notes"][1:]]
    write_report(options.results_dir / name, arms, title=f"{TITLES[name]} on the testbed", notes=[*notes, command])
    (options.results_dir / f"{name}.md").write_text(table(name, reports, options.seeds, command))


def table(name: str, reports: list[dict], seeds: list[int], command: str) -> str:
    """Every arm and seed on the splits that matter, and the mean with the standard deviation over the seeds."""
    lines = [
        f"# {TITLES[name]} on the testbed, seed by seed",
        "",
        "Everything in percent. `adv`: scenes in which partners are mostly absent; `iid`: scenes as in training. Each "
        "arm has the learning rate that was best on a development split of its seed, and was evaluated once. "
        f"{command}; all metrics: [{name}]({name}/report.md).",
    ]
    for split in SPLITS:
        head = ["arm", "seed", "learning rate", *SHOWN.values(), "POPE adversarial"]
        lines += ["", f"## {split}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for place, first in enumerate(reports[0]["arms"]):
            values = []
            for seed, report in zip(seeds, reports, strict=True):
                arm = report["arms"][place]
                metrics = arm["metrics"][split]
                values.append([100 * metrics[key] for key in (*SHOWN, "pope_adversarial_accuracy")])
                lines.append(row([first["title"], str(seed), arm["rate"], *(f"{value:.1f}" for value in values[-1])]))
            means = [f"**{mean(column):.1f} ± {pstdev(column):.1f}**" for column in zip(*values, strict=True)]
            lines.append(row([first["title"], "all", "", *means]))
    return "\n".join(lines) + "\n"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
