"""Do facts help a reward model? Held-out accuracy with and without them, when it sees well and when it sees badly.

    python -m benchmarks.studies.testbed_gates --worlds 0 --models 0 1 2     # the supervised models
    python -m benchmarks.studies.reward_facts --models runs/testbed/w0m0 runs/testbed/w0m1 runs/testbed/w0m2

For each supervised model, four reward models are trained on the same pairs of its own replies: with and without
facts, on the pictures as they are and on pictures with extra pixel noise. Finished runs are skipped. Writes
`reward_facts.json` and `reward_facts.md` into `--results_dir`.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText

from trl_vlm import RewardConfig, RewardTrainer
from trl_vlm.models import load_processor
from trl_vlm.testbed import JUDGE_TEMPLATE, World
from trl_vlm.testbed.datasets import preference_rows
from trl_vlm.testbed.evaluate import caption_sampler

logger = logging.getLogger("reward_facts")

SETS = {
    "all": "all pairs",
    "balanced": "length-balanced pairs",
    "shorter": "pairs whose shorter reply is better",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="Folders of supervised testbed models.")
    parser.add_argument("--noises", type=float, nargs="+", default=[0.0, 0.6], help="Extra pixel noise (sd).")
    parser.add_argument("--pairs", type=int, default=2500, help="Training pairs.")
    parser.add_argument("--held_out", type=int, default=1000, help="Held-out pairs.")
    parser.add_argument("--steps", type=int, default=200, help="Optimiser steps of 32 pairs.")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reward_facts"), help="Records of single runs.")
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"), help="Where the tables go.")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    runs = []
    for noise in options.noises:
        for folder in options.models:
            runs += records(folder, noise, options)
            write(runs, options)


def records(folder: Path, noise: float, options: argparse.Namespace) -> list[dict]:
    """The runs with and without facts for one supervised model, trained or read from an earlier call."""
    paths = {
        facts: options.output_dir / f"{folder.name}_noise{noise}_{'facts' if facts else 'plain'}.json"
        for facts in (True, False)
    }
    if not all(path.exists() for path in paths.values()):
        train, test = pairs(folder, noise, options)
        for facts, path in paths.items():
            if not path.exists():
                path.write_text(json.dumps(run(folder, noise, facts, train, test, options), indent=2))
    return [json.loads(path.read_text()) for path in paths.values()]


def pairs(folder: Path, noise: float, options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), load_processor(folder)
    sample, world = caption_sampler(model, processor), World.load(folder)
    counts = {1: options.pairs, 2: options.held_out}
    return tuple(preference_rows(world, n, seed, sample, vision_noise=noise) for seed, n in counts.items())


def run(folder: Path, noise: float, facts: bool, train: Dataset, test: Dataset, options: argparse.Namespace) -> dict:
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        args = RewardConfig(
            scratch,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=100,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            adam_beta2=0.98,
            use_facts=facts,
            freeze_vision_tower=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = RewardTrainer(
            model=str(folder), args=args, train_dataset=train, eval_dataset=test, judge_template=JUDGE_TEMPLATE
        )
        trainer.train()
        scores = np.asarray(trainer.predict(trainer.eval_dataset).predictions)  # (N, 2): chosen, rejected
    right = scores[:, 0] > scores[:, 1]
    record = {"model": folder.name, "noise": noise, "facts": facts, "cpu_seconds": time.process_time() - start}
    return record | {"accuracy": {name: float(right[rows].mean()) for name, rows in subsets(test).items()}}


def subsets(test: Dataset) -> dict[str, np.ndarray]:
    """Indices of all pairs, of as many pairs with the longer as with the shorter reply chosen, and of the latter."""
    chosen, rejected = (
        np.array([len(reply[0]["content"].split()) for reply in test[side]]) for side in ("chosen", "rejected")
    )
    longer, shorter = np.flatnonzero(chosen > rejected), np.flatnonzero(chosen < rejected)
    fewer = min(len(longer), len(shorter))
    balanced = np.concatenate([longer[:fewer], shorter[:fewer], np.flatnonzero(chosen == rejected)])
    return {"all": np.arange(len(test)), "balanced": balanced, "shorter": shorter}


def write(runs: list[dict], options: argparse.Namespace) -> None:
    options.results_dir.mkdir(parents=True, exist_ok=True)
    (options.results_dir / "reward_facts.json").write_text(json.dumps(runs, indent=2) + "\n")
    (options.results_dir / "reward_facts.md").write_text(report(runs, options))


def report(runs: list[dict], options: argparse.Namespace) -> str:
    seeds = len({run["model"] for run in runs})
    lines = [
        "# Reward models with and without facts",
        "",
        f"Held-out accuracy in percent, mean ± standard deviation over {seeds} supervised models from scratch; "
        f"{options.pairs} training pairs, {options.steps} steps of 32 pairs, {options.held_out} held-out pairs. "
        "Written by `benchmarks/studies/reward_facts.py` on one CPU thread.",
        "",
        "| extra pixel noise (sd) | held-out pairs | with facts | without facts | difference | better in |",
        "|---|---|---|---|---|---|",
    ]
    for noise in sorted({run["noise"] for run in runs}):
        for name, title in SETS.items():
            with_facts, without = (
                [100 * r["accuracy"][name] for r in runs if r["noise"] == noise and r["facts"] == facts]
                for facts in (True, False)
            )
            differences = [a - b for a, b in zip(with_facts, without, strict=True)]
            lines.append(
                f"| {noise:g} | {title} | {spread(with_facts)} | {spread(without)} | {spread(differences)} | "
                f"{sum(d > 0 for d in differences)} of {len(differences)} |"
            )
    seconds = statistics.mean(run["cpu_seconds"] for run in runs)
    lines += ["", f"One reward model takes {seconds:.0f} CPU seconds on average."]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


if __name__ == "__main__":
    main()
