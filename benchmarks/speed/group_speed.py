"""How much faster an update is when the replies to a prompt share one pass through prompt and image.

    python -m benchmarks.speed.group_speed --pairs 3 --output docs/results/group_speed.json

Each figure is a whole optimizer step (loss, gradients, AdamW) on one micro-batch: for GRPO and RLOO our trainer beside
TRL's own, for PPO, which TRL lacks, beside ours with `share_prefix` off, and for scoring the reward function
`RewardModelReward` with sharing and without. The two sides take turns on the same rows in one process, in CPU seconds.
The model is that of `dpo_speed.py`: LLaVA-1.5's shape (576 image tokens), random, width 384, six layers.

The limit counts tokens of the language model: G (p + r) / (p + G r) for G replies of r tokens to a prompt of p. The
vision tower sees an image once instead of G times, which comes on top. On a CPU TRL's head scores the prompts too,
which would flatter us; here it scores the replies alone on both sides, as on a GPU.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image

import trl_vlm
from benchmarks.speed.dpo_speed import WORDS, processor, save_model, spread
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.reward_model import load_reward_model
from trl_vlm.rewards import RewardModelReward

IMAGE_TOKENS, PROMPT_WORDS, CHAT_TOKENS = 576, 26, 4


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        method: GRPO, RLOO, PPO or scoring.
        replies: To each prompt.
        reply_tokens: Of each.
        image: Whether the prompt has one.
        asked: The least speed-up that the project asks for.
    """

    method: str
    replies: int
    reply_tokens: int
    image: bool = True
    asked: float | None = None

    @property
    def prompts(self) -> int:
        """Enough for several rows where there is one reply to each."""
        return 2 if self.replies == 1 else 1

    @property
    def prompt_tokens(self) -> int:
        """With the image's."""
        return PROMPT_WORDS + CHAT_TOKENS + IMAGE_TOKENS * self.image

    @property
    def limit(self) -> float:
        """By the tokens that need not be computed."""
        plain = self.replies * (self.prompt_tokens + self.reply_tokens)
        return plain / (self.prompt_tokens + self.replies * self.reply_tokens)


ASKED = {1: 0.98, 4: 2.4, 8: 3.1}
CASES = [
    *(Case("GRPO", replies, 128, asked=asked) for replies, asked in ASKED.items()),
    Case("GRPO", 8, 512, asked=1.6),
    Case("GRPO", 4, 128, image=False, asked=1.0),
    Case("GRPO", 8, 128, image=False, asked=1.0),
    *(Case(method, replies, 128, asked=asked) for method in ("RLOO", "PPO") for replies, asked in ASKED.items()),
    *(Case("scoring", replies, 128) for replies in (4, 8)),
]


def rollout(case: Case) -> dict[str, Any]:
    """What a trainer would have buffered: prompts, replies of full length, and what the losses read."""
    generator = torch.Generator().manual_seed(0)
    count = case.prompts * case.replies
    first_word = len(processor("llava").tokenizer) - WORDS
    prompts = torch.randint(first_word, first_word + WORDS, (case.prompts, case.prompt_tokens), generator=generator)
    batch: dict[str, Any] = {}
    if case.image:
        prompts[:, 1 : 1 + IMAGE_TOKENS] = processor("llava").tokenizer.image_token_id
        pixels = torch.randn(case.prompts, 3, 336, 336, generator=generator)
        batch |= {"pixel_values": pixels.repeat_interleave(case.replies, 0), "num_images": [1] * count}
    shape = (count, case.reply_tokens)
    draws = torch.randn(3, *shape, generator=generator)
    batch |= {
        "prompt_ids": prompts.repeat_interleave(case.replies, 0),
        "prompt_mask": torch.ones(count, case.prompt_tokens, dtype=torch.long),
        "completion_ids": torch.randint(first_word, first_word + WORDS, shape, generator=generator),
        "completion_mask": torch.ones(shape, dtype=torch.long),
        "num_items_in_batch": torch.tensor(float(count * case.reply_tokens)),
        "advantages": draws[0] if case.method == "PPO" else draws[0, :, 0],
        "old_per_token_logps": draws[1] - 7,
        "old_logps": draws[1].sum(1) - 7 * case.reply_tokens,
    }
    return batch | ({"old_values": draws[2], "returns": draws[0]} if case.method == "PPO" else {})


def words(count: int, seed: int) -> str:
    return " ".join(f"w{number}" for number in np.random.RandomState(seed).randint(0, WORDS, count))


def row(case: Case) -> dict[str, Any]:
    """A prompt with its image."""
    pixels = np.random.RandomState(0).randint(0, 255, (336, 336, 3), dtype=np.uint8)
    prompt = [{"role": "user", "content": words(PROMPT_WORDS, 0)}]
    return {"prompt": prompt} | ({"images": [Image.fromarray(pixels)]} if case.image else {})


def update(case: Case, ours: bool, model: str, folder: str) -> Callable[[], Any]:
    """A step of one trainer."""
    theirs = not ours and case.method != "PPO"
    module = trl if theirs else trl_vlm
    options = {} if theirs else {"share_prefix": ours}
    options |= {"share_base": False} if case.method == "PPO" else {}
    args = getattr(module, f"{case.method}Config")(
        folder,
        num_generations=case.replies if case.method == "PPO" else max(case.replies, 2),
        per_device_train_batch_size=case.prompts * case.replies,
        max_completion_length=case.reply_tokens,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_steps=1000,
        **options,
    )
    trainer = getattr(module, f"{case.method}Trainer")(
        model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([row(case)] * 8),
        processing_class=processor("llava"),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    optimizer, batch = trainer.create_optimizer(), rollout(case)

    def step() -> None:
        trainer._compute_loss(trainer.model, dict(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def scoring(case: Case, ours: bool, model: str) -> Callable[[], Any]:
    """The reward function on the replies to one prompt, processor included."""
    reward = RewardModelReward(
        load_reward_model(model), processor("llava"), JudgeTemplate.none(), share_prefix=ours, name="reward"
    )
    prompt = row(case)
    # The end of the turn counts as a token.
    replies = [
        [{"role": "assistant", "content": words(case.reply_tokens - 1, place)}] for place in range(case.replies)
    ]
    columns = {"prompts": [prompt["prompt"]] * case.replies, "images": [prompt["images"]] * case.replies}
    return lambda: reward(completions=replies, **columns)


def measure(case: Case, pairs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_model("llava", folder)
        make = scoring if case.method == "scoring" else lambda *args: update(*args, folder=f"{folder}/{args[1]}")
        sides = {name: make(case, ours, folder) for name, ours in (("plain", False), ("shared", True))}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(pairs + 1):
            for name in sorted(sides, reverse=bool(turn % 2)):  # each side goes first in turn
                start = time.process_time()
                sides[name]()
                if turn:  # the first one makes the optimizer's state
                    times[name].append(time.process_time() - start)
    speedup = spread([plain / shared for plain, shared in zip(times["plain"], times["shared"], strict=True)])
    return {
        **vars(case),
        "prompt_tokens": case.prompt_tokens,
        "limit": case.limit,
        "seconds_plain": times["plain"],
        "seconds_shared": times["shared"],
        "speedup": speedup,
    }


def table(results: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# Speed of an update with shared groups",
        "",
        "A whole optimizer step on one micro-batch, in CPU seconds: median of "
        f"{_numbers(results)} paired steps (least to most). GRPO and RLOO stand beside TRL's own, "
        "PPO beside ours with `share_prefix=False`; scoring is the reward function, image preprocessing included. The "
        "limit counts the tokens that need not be computed in the language model; an image that the vision tower sees "
        "once comes on top, which is how a ratio can exceed it. One reply to a prompt (two prompts) shares nothing. "
        f"TRL's head scores the replies alone on both sides, as on a GPU. {facts['threads']} thread, torch "
        f"{facts['torch']}, TRL {facts['trl']}, a random model of width 384 and six layers. "
        "Other programs ran on the same two cores. "
        "`python -m benchmarks.speed.group_speed --pairs 3 --output docs/results/group_speed.json`; the rows with one "
        "reply need many steps to be told apart: `--replies 1 --pairs 40`, on quiet cores.",
        "",
        "| method | replies | prompt + reply tokens | seconds plain, shared | faster | target | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        speedup = result["speedup"]
        seconds = ", ".join(f"{spread(result[f'seconds_{side}'])['median']:.2f}" for side in ("plain", "shared"))
        lines.append(
            f"| {result['method']} | {result['replies']} | {result['prompt_tokens']} + {result['reply_tokens']} "
            f"| {seconds} | {speedup['median']:.2f} ({speedup['least']:.2f} to {speedup['most']:.2f}) "
            f"| {result['asked'] or ''} | {result['limit']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _numbers(results: list[dict[str, Any]]) -> str:
    """How many steps were compared, at least and at most."""
    return " to ".join(map(str, sorted({len(result["seconds_plain"]) for result in results})))


def compact_head(device: torch.device) -> bool:
    """Takes the place of TRL's question whether the head may score some columns alone."""
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="how many steps of each side are compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", help="only these: GRPO, RLOO, PPO, scoring")
    parser.add_argument("--replies", type=int, nargs="+", help="only these numbers of replies")
    parser.add_argument("--output", type=Path, help="JSON, with a table beside it; its other results stay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    trl.trainer.utils._use_triton = compact_head
    facts = {"torch": torch.__version__, "trl": trl.__version__, "transformers": transformers.__version__}
    facts |= {"threads": args.threads, "cores": os.cpu_count()}
    for case in CASES:
        if case.method not in (args.methods or [case.method]) or case.replies not in (args.replies or [case.replies]):
            continue
        result = measure(case, args.pairs) | {"load": os.getloadavg()[0]}
        speedup = result["speedup"]
        print(
            f"{case.method}, {case.replies} replies, {case.prompt_tokens} + {case.reply_tokens} tokens: "
            f"{speedup['median']:.2f} times ({speedup['least']:.2f} to {speedup['most']:.2f}), "
            f"target {case.asked}, limit {case.limit:.2f}",
            flush=True,
        )
        if args.output:
            save(result, facts, args.output)


def save(result: dict[str, Any], facts: dict[str, Any], path: Path) -> None:
    """Puts a result into a file, in the place of an earlier one of the same case, and writes the table."""
    known = json.loads(path.read_text())["results"] if path.exists() else []
    by_case = {_case_of(one): one for one in [*known, result]}
    results = [by_case[_case_of(vars(case))] for case in CASES if _case_of(vars(case)) in by_case]
    path.write_text(json.dumps({"settings": facts, "results": results}, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(results, facts))


def _case_of(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("method", "replies", "reply_tokens", "image"))


if __name__ == "__main__":
    main()
