"""PPO with a reward at the end of each claim beside the same reward at the end of the reply.

    python -m benchmarks.studies.ppo_claims --seeds 0 1 2 --results_dir docs/results

The model and the pictures of `ppo_colours`. In its own task a reply names one color, which is one claim. In the other
one a picture has a color in each of its four quarters, and a reply names them in their order: four claims, of which
each is worth 1 if it is right. `ClaimReward` counts them with a checker that knows the colors; both runs of a seed
differ in nothing but the tokens that the rewards lie on. Writes `ppo_claims.json` and `ppo_claims.md`.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image

from benchmarks.studies.ppo_colours import COLOURS, SIZE, build_model, build_processor
from trl_vlm import PPOConfig, PPOTrainer
from trl_vlm.data.rows import Row
from trl_vlm.rewards import Claim, ClaimQuestion, ClaimReward, ClaimVerdict, ReplyClaims

logger = logging.getLogger("ppo_claims")

ROLLOUT = 64  # replies
GOAL = 0.9  # of the claims


class Task(NamedTuple):
    """How many colors a picture has, and how long it is learned."""

    colors: int
    rollouts: int


TASKS = {"one claim": Task(1, 40), "four claims": Task(4, 80)}
PLACES = ("reply end", "claim ends")


def split_into_words(rows: Sequence[Row], replies: Sequence[str]) -> list[ReplyClaims]:
    """Each word as a claim: it has its number, since it speaks of one quarter of the picture."""
    found = []
    for reply in replies:
        claims, end = [], 0
        for number, word in enumerate(reply.split()):
            end = reply.index(word, end) + len(word)
            claims.append(Claim(f"{number} {word}", end))
        found.append(ReplyClaims(claims))
    return found


class KnowsTheColors:
    """The truth: the column `colors`."""

    def check(self, questions: Sequence[ClaimQuestion]) -> list[ClaimVerdict]:
        verdicts = []
        for row, text in questions:
            number, word = text.split()
            verdicts.append(ClaimVerdict(row["colors"][int(number) : int(number) + 1] == [word]))
        return verdicts


def build_rows(count: int, colors: int, seed: int) -> Dataset:
    """Pictures of noise around one color, or around one in each quarter."""
    random = np.random.RandomState(seed)
    rows = []
    for _ in range(count):
        names = [list(COLOURS)[index] for index in random.randint(len(COLOURS), size=colors)]
        quarters = np.array([COLOURS[name] for name in names * (4 // colors)], float).reshape(2, 2, 3)
        pixels = np.kron(quarters, np.ones((SIZE // 2, SIZE // 2, 1)))
        picture = np.clip(random.normal(pixels, 40), 0, 255).astype(np.uint8)
        prompt = [{"role": "user", "content": "what colour is it ?"}]
        rows.append({"prompt": prompt, "images": [Image.fromarray(picture)], "colors": names})
    return Dataset.from_list(rows)


def train(task: Task, at_claim_ends: bool, seed: int, folder: str) -> dict[str, Any]:
    """One run: the share of right claims after each rollout, and when it was learned."""
    processor = build_processor()
    path = Path(folder) / "start"
    build_model(processor, seed).save_pretrained(path)
    processor.save_pretrained(path)
    reward = ClaimReward(
        KnowsTheColors(),
        split_into_words,
        right=1.0,
        wrong=0.0,
        at_claim_ends=processor.tokenizer if at_claim_ends else None,
    )
    args = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=ROLLOUT // 2,
        per_device_eval_batch_size=ROLLOUT,
        max_completion_length=task.colors + 1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        num_iterations=2,
        num_mini_batches=2,
        kl_coef=0.0,
        vf_coef=0.5,
        max_steps=task.rollouts * 4,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    rows = build_rows(ROLLOUT * task.rollouts, task.colors, seed)
    trainer = PPOTrainer(
        str(path), reward, args, train_dataset=rows, eval_dataset=build_rows(256, task.colors, 1000 + seed)
    )
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    curve = [log["reward"] / task.colors for log in trainer.state.log_history if "reward" in log]
    assert len(curve) == task.rollouts
    return {
        "rewards_at": PLACES[at_claim_ends],
        "colors": task.colors,
        "seed": seed,
        "replies": ROLLOUT * task.rollouts,
        "replies_to_goal": _replies_to(GOAL, curve),
        "area": round(statistics.mean(curve), 4),
        "last": round(statistics.mean(curve[-max(1, task.rollouts // 10) :]), 4),
        "new_pictures": round(trainer.evaluate()["eval_reward"] / task.colors, 4),
        "cpu_seconds": round(seconds, 1),
        "curve": [round(share, 3) for share in curve],
    }


def _replies_to(goal: float, curve: Sequence[float]) -> int | None:
    """Replies sampled until the mean of five rollouts has first reached the goal."""
    for end in range(5, len(curve) + 1):
        if statistics.mean(curve[end - 5 : end]) >= goal:
            return end * ROLLOUT
    return None


def table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# PPO with rewards at the end of each claim",
        "",
        "The tiny LLaVA of [PPO names colours](ppo_colours.md), with its learning rate, which was chosen for rewards "
        "at the end of a reply and not changed. One claim: a reply names the color of the picture. Four claims: it "
        "names those of the four quarters, in their order. Each right claim is worth 1, a wrong one nothing "
        "(`ClaimReward` with a checker that knows the colors); the two runs of a seed start from the same weights, "
        "see the same pictures, and differ in nothing but the tokens on which the rewards lie. A policy that ignores "
        "the picture gets 0.25 of the claims. "
        f"Learned: the mean of five rollouts has reached {GOAL}. The mean over the run says how fast it went before. "
        f"One thread of a CPU, torch {torch.__version__}, transformers {transformers.__version__}, TRL "
        f"{trl.__version__}. Written by `python -m benchmarks.studies.ppo_claims`.",
        "",
        "| claims | rewards at | seed | replies until learned | of | mean over the run | last tenth | new pictures | "
        "CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        learned = run["replies_to_goal"] or "not reached"
        cells = [run["colors"], run["rewards_at"], run["seed"], learned, run["replies"]]
        cells += [f"{run[key]:.2f}" for key in ("area", "last", "new_pictures")] + [run["cpu_seconds"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def write(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    lines = ",\n".join(json.dumps(run) for run in runs)
    (folder / "ppo_claims.json").write_text(f"[\n{lines}\n]\n")
    (folder / "ppo_claims.md").write_text(table(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rollouts", type=int, help="in place of each task's own number")
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.results_dir.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for name in options.tasks:
        task = TASKS[name]._replace(**({"rollouts": options.rollouts} if options.rollouts else {}))
        for seed in options.seeds:
            for at_claim_ends in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    runs.append(train(task, at_claim_ends, seed, folder))
                logger.info("%s", {key: value for key, value in runs[-1].items() if key != "curve"})
                write(runs, options.results_dir)


if __name__ == "__main__":
    main()
