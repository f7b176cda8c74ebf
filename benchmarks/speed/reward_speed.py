"""How much faster a step of reward training is when prompt and image of a pair are computed once, and its memory.

    python -m benchmarks.speed.reward_speed --pairs 5 --output docs/results/reward_speed.json

Each figure is a whole optimiser step of `trl_vlm.RewardTrainer` with `share_prefix` beside one without, on the same
pair of a LLaVA-1.5-shaped model (576 image tokens), taken in turns in one process; plain TRL cannot train on images.
The limit is the count of tokens that need not be computed: 2 (p + r) / (p + 2 r) for two replies of r tokens to a
prompt of p. Peak memory is that of one step in a fresh process per side (Linux). The models are random, those of
`dpo_speed.py`, and there is no judge turn, which would add to the replies.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl

from benchmarks.speed.dpo_speed import Row, processor, resident, rows, save_model, spread
from trl_vlm import RewardConfig, RewardTrainer
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.prefix_sharing.sharing import SHARED_PREFIX

REPLY_TOKENS = (64, 128)
SIDES = {"plain": False, "shared": True}


class Side:
    """One trainer, its batch, and how long a step takes."""

    def __init__(self, share: bool, reply_tokens: int, model: str, folder: str):
        data = rows("llava", [Row((reply_tokens, reply_tokens))])
        args = RewardConfig(
            folder, share_prefix=share, check_pixels=False, use_cpu=True, bf16=False, report_to="none", max_steps=1000
        )
        self.trainer = RewardTrainer(
            model, args, train_dataset=data, processing_class=processor("llava"), judge_template=JudgeTemplate.none()
        )
        self.trainer.model.train()
        self.optimizer = self.trainer.create_optimizer()
        self.batch = self.trainer.data_collator([self.trainer.train_dataset[0]])

    def step(self) -> float:
        """Seconds of one step."""
        start = time.process_time()
        loss = self.trainer.compute_loss(self.trainer.model, dict(self.batch))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def measure(reply_tokens: int, pairs: int, with_memory: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        save_model("llava", folder)
        sides = {name: Side(share, reply_tokens, folder, f"{folder}/{name}") for name, share in SIDES.items()}
        for side in sides.values():
            side.step()
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(pairs):
            for name, side in sides.items():
                times[name].append(side.step())
    batch = sides["shared"].batch
    prompt = int(batch[SHARED_PREFIX][0, 1])
    reply = int(batch["attention_mask"][0].sum()) - prompt
    limit = 2 * (prompt + reply) / (prompt + 2 * reply)
    speedup = spread([plain / shared for plain, shared in zip(times["plain"], times["shared"], strict=True)])
    result = {
        "prompt_tokens": prompt,
        "reply_tokens": reply,
        "limit": limit,
        "seconds_plain": times["plain"],
        "seconds_shared": times["shared"],
        "speedup": speedup,
        "share_of_limit": speedup["median"] / limit,
    }
    if with_memory:
        result["peak_mib"] = {name: peak_memory(name, reply_tokens) for name in SIDES}
    return result


def peak_memory(side: str, reply_tokens: int) -> float:
    """MiB that a step needs above model, optimiser state and batch."""
    command = [sys.executable, "-m", "benchmarks.speed.reward_speed", "--memory_of", side, str(reply_tokens)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_memory(name: str, reply_tokens: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_model("llava", folder)
        side = Side(SIDES[name], int(reply_tokens), folder, f"{folder}/out")
        side.step()  # makes the optimiser's state
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of imports and loading
        before = resident("VmRSS")
        side.step()
        print(resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="how many steps of each side are compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    if args.memory_of:
        print_memory(*args.memory_of)
        return
    results = [measure(reply_tokens, args.pairs, not args.no_memory) for reply_tokens in REPLY_TOKENS]
    for result in results:
        speedup = result["speedup"]
        print(
            f"{result['prompt_tokens']} + {result['reply_tokens']} tokens: {speedup['median']:.2f} times "
            f"({speedup['least']:.2f} to {speedup['most']:.2f}), limit {result['limit']:.2f}; "
            f"peak memory {result.get('peak_mib', 'not measured')}"
        )
    if args.output:
        facts = {"torch": torch.__version__, "trl": trl.__version__, "transformers": transformers.__version__}
        facts |= {"threads": args.threads, "cores": os.cpu_count(), "load": os.getloadavg()}
        args.output.write_text(json.dumps({"settings": facts, "results": results}, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(table(results, facts))


def table(results: list[dict], facts: dict) -> str:
    """The results for people."""
    lines = [
        "# Speed of a step of reward training",
        "",
        "A whole optimiser step with `share_prefix` beside one without, in CPU seconds: median of "
        f"{len(results[0]['seconds_plain'])} paired steps (least to most). The limit counts the tokens that need not "
        "be computed in the language model; images that the vision tower sees once come on top, which is how a ratio "
        f"can exceed it. {facts['threads']} thread, torch {facts['torch']}, a model of width 384 and six layers with "
        "random weights. Other programs ran on the same two cores (load in the JSON). "
        "`python -m benchmarks.speed.reward_speed --pairs 5 --output docs/results/reward_speed.json`",
        "",
        "| prompt + reply tokens | faster | limit | share of the limit | MiB plain, shared |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        memory = ", ".join(f"{value:.0f}" for value in result.get("peak_mib", {}).values()) or "not measured"
        speedup = result["speedup"]
        lines.append(
            f"| {result['prompt_tokens']} + {result['reply_tokens']} | {speedup['median']:.2f} "
            f"({speedup['least']:.2f} to {speedup['most']:.2f}) | {result['limit']:.2f} "
            f"| {result['share_of_limit']:.2f} | {memory} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
