"""What an update of PPO costs beside one of RLOO, which has no critic.

    python -m benchmarks.speed.ppo_rloo_speed --pairs 3 --output docs/results/ppo_rloo_speed.json

Each figure is a whole optimizer step (loss, gradients, AdamW) of `trl_vlm.PPOTrainer` beside one of
`trl_vlm.RLOOTrainer` on the same prompts and replies, which share each prompt. The two take turns in one process, in
CPU seconds. The model is that of `group_speed.py`; PPO's critic is a model of its own, of the policy's size.

By count the ratio is 2: two models of one size pass forward and backward, and AdamW steps both, where RLOO has one. A
critic's head of one number makes it less, the value loss more. What both do once per rollout (sampling, rewards,
log-probabilities before the update) is left out, and so is PPO's further pass for old values.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from benchmarks.speed.dpo_speed import save_model, spread
from benchmarks.speed.group_speed import Case, compact_head, update

REPLIES = (2, 4, 8)
REPLY_TOKENS = 128
BY_COUNT = 2.0


def measure(replies: int, pairs: int) -> dict[str, Any]:
    """Seconds of steps of both, in turns."""
    cases = {method: Case(method, replies, REPLY_TOKENS) for method in ("RLOO", "PPO")}
    with tempfile.TemporaryDirectory() as folder:
        save_model("llava", folder)
        steps = {name: update(case, True, folder, f"{folder}/{name}") for name, case in cases.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(pairs + 1):
            for name, step in steps.items():
                start = time.process_time()
                step()
                if turn:  # the first one makes the optimizer's state
                    times[name].append(time.process_time() - start)
    return {
        "replies": replies,
        "prompt_tokens": cases["PPO"].prompt_tokens,
        "reply_tokens": REPLY_TOKENS,
        "by_count": BY_COUNT,
        "seconds_rloo": times["RLOO"],
        "seconds_ppo": times["PPO"],
        "ratio": spread([ppo / rloo for ppo, rloo in zip(times["PPO"], times["RLOO"], strict=True)]),
        "load": os.getloadavg()[0],
    }


def table(results: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# An update of PPO beside one of RLOO",
        "",
        f"A whole optimizer step on a micro-batch, in CPU seconds: median of {len(results[0]['seconds_ppo'])} paired "
        "steps (least to most). Both are ours, and the replies to a prompt share it. PPO trains a critic of the "
        "policy's size beside it: by count of models, 2. Sampling and rewards, the same in both, and PPO's pass for "
        "old values are left out. "
        f"{facts['threads']} thread, torch {facts['torch']}, TRL {facts['trl']}, a random model of width 384 and six "
        "layers, 576 image tokens. Other programs ran on the same two cores (load in the JSON). "
        "`python -m benchmarks.speed.ppo_rloo_speed --pairs 3 --output docs/results/ppo_rloo_speed.json`",
        "",
        "| replies | prompt + reply tokens | seconds RLOO, PPO | PPO / RLOO | by count |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        ratio = result["ratio"]
        seconds = ", ".join(f"{spread(result[f'seconds_{side}'])['median']:.2f}" for side in ("rloo", "ppo"))
        lines.append(
            f"| {result['replies']} | {result['prompt_tokens']} + {result['reply_tokens']} | {seconds} "
            f"| {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f}) | {result['by_count']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="how many steps of each side are compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON, with a table beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    trl.trainer.utils._use_triton = compact_head
    facts = {"torch": torch.__version__, "trl": trl.__version__, "transformers": transformers.__version__}
    facts |= {"threads": args.threads, "cores": os.cpu_count()}
    results = []
    for replies in REPLIES:
        results.append(measure(replies, args.pairs))
        print(json.dumps(results[-1]), flush=True)
    print(table(results, facts))
    if args.output:
        args.output.write_text(json.dumps({"settings": facts, "results": results}, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(table(results, facts))


if __name__ == "__main__":
    main()
