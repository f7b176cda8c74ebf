"""How much faster PPO and DPO are when a frozen vision tower encodes each image once.

    python -m benchmarks.speed.image_features --pairs 3 --output docs/results/image_features.json

Each figure is a training (PPO: one rollout of two prompts and four passes over it, on one base with a reward model;
DPO: one step of two pairs, reference included) with `image_feature_cache` at its default beside one with 0, on the
same rows, taken in turns in one process, in CPU seconds of one thread; how far the weights end apart is told too.
The models are random: six layers of width 384, LoRA, and CLIP towers that do, for a prompt, the share of the language
model's multiplications that the towers of two real models do.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image

from benchmarks.speed import dpo_speed
from trl_vlm import DPOConfig, DPOTrainer, PPOConfig, PPOTrainer
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.parts import part_of
from trl_vlm.models.reward_model import load_reward_model
from trl_vlm.trainers.adapters import lora_targets

PIXELS, PATCH = 224, 14
REPLY_TOKENS = 32


class Tower(NamedTuple):
    """A CLIP tower, named after the model whose share it has."""

    width: int
    feed_forward: int
    layers: int


# Of a prompt's multiplications in the language model: 0.3 of 6.7 billion weights; 0.67 of 3.1 billion, four patches
# to an image token.
TOWERS = {"LLaVA-1.5-7B": Tower(128, 384, 3), "Qwen2.5-VL-3B": Tower(384, 1536, 5)}


def processor() -> transformers.LlavaProcessor:
    """LLaVA's, with small images and words as tokens."""
    tokenizer = dpo_speed.processor("llava").tokenizer
    size = {"shortest_edge": PIXELS}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size={"height": PIXELS, "width": PIXELS})
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer, chat_template=dpo_speed.CHAT, **settings)


def save_models(tower: Tower, folder: str) -> float:
    """Writes a policy and a reward model that is an adapter of it; returns the tower's share of a prompt's work."""
    torch.manual_seed(0)
    text = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    vision = {
        "hidden_size": tower.width,
        "intermediate_size": tower.feed_forward,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": 4,
        "image_size": PIXELS,
        "patch_size": PATCH,
    }
    made = processor()
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", "vocab_size": len(made.tokenizer), **text},
        image_token_index=made.tokenizer.image_token_id,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = None  # replies of one length
    model.save_pretrained(f"{folder}/policy")
    made.save_pretrained(f"{folder}/policy")
    reward = load_reward_model(f"{folder}/policy")
    adapter = LoraConfig(r=8, target_modules=lora_targets(reward), task_type="SEQ_CLS", modules_to_save=["score"])
    get_peft_model(reward, adapter).save_pretrained(f"{folder}/reward")
    made.save_pretrained(f"{folder}/reward")
    JudgeTemplate.none().save_pretrained(f"{folder}/reward")
    sizes = {"vision tower": 0, "language model": 0}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and part_of(name) in sizes:
            sizes[part_of(name)] += parameter.numel()
    return sizes["vision tower"] / sizes["language model"]


def rows(count: int) -> Dataset:
    """Prompts, each with an image of its own and two replies."""
    random = np.random.RandomState(0)

    def words(number: int) -> str:
        return " ".join(f"w{word}" for word in random.randint(0, dpo_speed.WORDS, number))

    return Dataset.from_list(
        [
            {
                "images": [Image.fromarray(random.randint(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8))],
                "prompt": [{"role": "user", "content": words(dpo_speed.PROMPT_WORDS)}],
                "chosen": [{"role": "assistant", "content": words(REPLY_TOKENS)}],
                "rejected": [{"role": "assistant", "content": words(REPLY_TOKENS)}],
            }
            for _ in range(count)
        ]
    )


def trainer(method: str, models: str, folder: str, limit: float) -> PPOTrainer | DPOTrainer:
    """A trainer of one rollout or one step."""
    options = {
        "per_device_train_batch_size": 2,
        "image_feature_cache": limit,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "append_eos": False,
    }
    adapter = LoraConfig(r=8, target_modules="language-model")
    data = rows(2)
    if method == "DPO":
        args = DPOConfig(folder, max_steps=1, max_length=None, **options)
        return DPOTrainer(f"{models}/policy", args=args, train_dataset=data, peft_config=adapter)
    data = data.remove_columns(["chosen", "rejected"])
    args = PPOConfig(folder, max_steps=4, max_completion_length=REPLY_TOKENS, check_pixels=False, **options)
    return PPOTrainer(
        f"{models}/policy", args=args, train_dataset=data, peft_config=adapter, reward_model=f"{models}/reward"
    )


def seconds(made: PPOTrainer | DPOTrainer) -> float:
    """CPU seconds of a training."""
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its logs
        made.train()
    return time.process_time() - start


def trained(made: PPOTrainer | DPOTrainer) -> dict[str, torch.Tensor]:
    """The weights that a training has changed."""
    return {name: parameter.detach() for name, parameter in made.model.named_parameters() if parameter.requires_grad}


def measure(method: str, name: str, pairs: int) -> dict:
    """Both sides, in turns."""
    times: dict[str, list[float]] = {"each time": [], "once": []}
    furthest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        share = save_models(TOWERS[name], folder)
        for pair in range(pairs + 1):
            weights = []
            for side, all_taken in times.items():
                # Made right before it trains: its constructor seeds what replies are drawn with.
                made = trainer(method, folder, f"{folder}/out", float(side == "once"))
                taken = seconds(made)
                if pair:  # the first pair warms up
                    all_taken.append(taken)
                weights.append(trained(made))
            one, other = weights
            furthest = max([furthest, *((one[key] - other[key]).abs().max().item() for key in one)])
    ratios = [a / b for a, b in zip(times["each time"], times["once"], strict=True)]
    return {
        "method": method,
        "tower": name,
        "tower_share": share,
        "seconds": times,
        "speedup": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "largest_difference_of_weights": furthest,
    }


def table(results: list[dict], facts: dict) -> str:
    """The results for people."""
    lines = [
        "# Speed of encoding each image once",
        "",
        f"PPO on one base (one rollout of two prompts with replies of {REPLY_TOKENS}, four passes) and DPO (one step "
        "of two pairs, policy and reference), LoRA on the language model, with `image_feature_cache` at 1 beside 0, "
        f"in CPU seconds of one thread: median of {facts['pairs']} pairs (least to most). Images of 256 tokens, a "
        "language model of width 384 and six layers, random weights; a tower's share is that of its multiplications "
        f"to the language model's for a prompt. torch {facts['torch']}. "
        "`python -m benchmarks.speed.image_features --pairs 3 --output docs/results/image_features.json`",
        "",
        "| | tower as of | share | seconds, each time | once | faster | weights differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        seconds_of = {side: statistics.median(values) for side, values in result["seconds"].items()}
        speedup = result["speedup"]
        lines.append(
            f"| {result['method']} | {result['tower']} | {result['tower_share']:.0%} | "
            f"{seconds_of['each time']:.1f} | {seconds_of['once']:.1f} | {speedup['median']:.2f} "
            f"({speedup['least']:.2f} to {speedup['most']:.2f}) | {result['largest_difference_of_weights']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, and writes JSON with a page beside it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=["PPO", "DPO"], default=["PPO", "DPO"])
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    results = [measure(method, tower, args.pairs) for method in args.methods for tower in args.towers]
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "pairs": args.pairs}
    facts |= {"threads": 1, "cores": os.cpu_count(), "load": os.getloadavg()}
    page = table(results, facts)
    print(page)
    if args.output:
        args.output.write_text(json.dumps({"settings": facts, "results": results}, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
