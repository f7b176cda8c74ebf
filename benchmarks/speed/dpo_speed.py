"""How much faster a DPO step is when each prompt and image is computed once, and what it costs in memory.

    python -m benchmarks.speed.dpo_speed --pairs 5 --output docs/results/dpo_speed.json

Each figure is a whole optimiser step (policy with gradient, reference without, AdamW) of `trl_vlm.DPOTrainer` beside
one of plain `trl.DPOTrainer`, TRL's fused head on in both, on the same rows, taken in turns in one process, in CPU
seconds of one thread. The limit is the count of tokens that need not be computed: TRL's, with padding, by those of all
prompts and replies, without. Peak memory is that of one step in a fresh process per trainer (Linux). The models are
random: six layers of width 384, and a CLIP tower. FlashAttention runs on GPUs alone; its path is measured with kernels
of the same interface that call SDPA for one sequence after the other, for TRL as for us.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
import trl
from datasets import Dataset, Features, Value
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from benchmarks import flash_stand_in
from trl_vlm import DPOConfig, DPOTrainer

WORDS = 1000
CHAT = (
    "{% for m in messages %}<user> {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} <end> {% endfor %}"
    "{% if add_generation_prompt %}<user> {% endif %}"
)


@dataclass(frozen=True)
class Row:
    """One row: words of its prompt (the template adds four tokens), tokens of its replies, whether it has an image."""

    replies: tuple[int, ...] = (64, 64)
    words: int = 26
    has_image: bool = True


@dataclass(frozen=True)
class Setting:
    """A batch, and what is measured with it."""

    rows: tuple[Row, ...]
    family: str = "llava"
    attention: str = "sdpa"
    with_cache: bool = False  # and the memory


MIXED = (Row((20, 90), 40), Row((64, 30), 15), Row((110, 75), 120), Row((40, 48), 70))
# One long prompt with short replies beside one short prompt with long replies.
WORST = (Row((16, 16)), Row((508, 508), has_image=False))
ROWS = {
    "llava-64": Setting((Row(),), with_cache=True),
    "llava-128": Setting((Row((128, 128)),)),
    "llava-512": Setting((Row((512, 512)),)),
    "next-64": Setting((Row(),), "llava_next", with_cache=True),
    "extra": Setting((Row((64, 64, 64)),), with_cache=True),
    "mixed": Setting(MIXED),
    "worst": Setting(WORST),
    "text-64": Setting((Row(has_image=False),) * 4),
    "text-512": Setting((Row((512, 512), has_image=False),)),
    "text-long": Setting((Row((64, 64), 600, has_image=False),)),
    "llava-64, variable length": Setting((Row(),), attention="flash_attention_2"),
    "mixed, variable length": Setting(MIXED, attention="flash_attention_2"),
    "worst, variable length": Setting(WORST, attention="flash_attention_2"),
    "text-64, variable length": Setting((Row(has_image=False),) * 4, attention="flash_attention_2"),
}


def processor(family: str):
    vocabulary = ["<pad>", "<unk>", "<user>", "<end>", "<image>", *(f"w{number}" for number in range(WORDS))]
    core = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", extra_special_tokens={"image_token": "<image>"}
    )
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    if family == "llava":
        images = transformers.CLIPImageProcessorPil(**size)
        return transformers.LlavaProcessor(images, tokenizer, chat_template=CHAT, **settings)
    images = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=[[336, 1008]], **size)
    return transformers.LlavaNextProcessor(images, tokenizer, chat_template=CHAT, **settings)


def save_model(family: str, folder: str) -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    tokenizer = processor(family).tokenizer
    common = {
        "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **vision},
        "text_config": {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 4096, **text},
        "image_token_index": tokenizer.image_token_id,
    }
    if family == "llava":
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**common))
    else:
        config = transformers.LlavaNextConfig(image_grid_pinpoints=[[336, 1008]], **common)
        model = transformers.LlavaNextForConditionalGeneration(config)
    model.save_pretrained(folder)


def rows(family: str, made_of: Sequence[Row]) -> Dataset:
    """A row of the dataset for each of `made_of`."""
    random = np.random.RandomState(0)
    shape = (336, 336, 3) if family == "llava" else (336, 840, 3)

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in random.randint(0, WORDS, count))

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    made = []
    for row in made_of:
        image = Image.fromarray(random.randint(0, 255, shape, dtype=np.uint8))
        # A reply is framed by the template: the marker of its turn is in the prompt, its end counts as a token.
        texts = [message("assistant", words(tokens - 1)) for tokens in row.replies]
        made.append({"prompt": message("user", words(row.words)), "chosen": texts[0], "rejected": texts[1]})
        made[-1]["images"] = [image] if row.has_image else []
        if len(texts) > 2:
            made[-1]["rejected_extra"] = texts[2:]
    return Dataset.from_list(made, features=features(len(made_of[0].replies)))


def features(replies: int) -> Features:
    """Also where no row has an image."""
    turns = [{"role": Value("string"), "content": Value("string")}]
    columns = {"prompt": turns, "chosen": turns, "rejected": turns, "images": [datasets.Image()]}
    return Features(columns | ({"rejected_extra": [turns]} if replies > 2 else {}))


def as_pairs(data: Dataset) -> Dataset:
    """What a trainer that knows pairs alone makes of rows with further rejected replies."""
    pairs = []
    for row in data:
        for reply in [row["rejected"], *row.pop("rejected_extra", [])]:
            pairs.append({**row, "rejected": reply})
    return Dataset.from_list(pairs)


class Side:
    """One trainer, its batch, and how long a step takes."""

    def __init__(self, kind: str, setting: Setting, saved: str, folder: str, checkpointing: bool):
        options = {
            "per_device_train_batch_size": 8,
            "max_length": None,
            "gradient_checkpointing": checkpointing,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "max_steps": 1000,
        }
        if kind == "cached":
            options["reference_cache"] = f"{folder}/cache"
        trainer, config = (trl.DPOTrainer, trl.DPOConfig) if kind == "trl" else (DPOTrainer, DPOConfig)
        data = rows(setting.family, setting.rows)
        data = as_pairs(data) if kind == "trl" else data
        model = transformers.AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32)
        if setting.attention != "sdpa":
            flash_stand_in.use(model)
        self.trainer = trainer(
            model,
            copy.deepcopy(model),
            args=config(folder, **options),
            train_dataset=data,
            processing_class=processor(setting.family),
        )
        self.trainer.model.train()
        if checkpointing:  # otherwise only `train` would switch it on
            self.trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = self.trainer.create_optimizer()
        given = self.trainer.train_dataset  # the cache knows images by their bytes, as they are there
        batch = self.trainer.data_collator([dict(given[index]) for index in range(len(given))])
        mask, replies = batch["attention_mask"], batch["completion_mask"]
        prompts = (mask.sum(1) - replies.sum(1))[: len(setting.rows)]
        # What the language model computes: padding too, or prompts once.
        self.tokens = mask.numel() if kind == "trl" else int(prompts.sum() + replies.sum())
        self.batch = dict(batch)

    def step(self) -> float:
        start = time.process_time()
        loss = self.trainer.compute_loss(self.trainer.model, dict(self.batch))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def measure(name: str, pairs: int, checkpointing: bool, with_memory: bool) -> dict:
    setting = ROWS[name]
    kinds = ("trl", "ours", "cached") if setting.with_cache else ("trl", "ours")
    with tempfile.TemporaryDirectory() as folder:
        save_model(setting.family, folder)
        sides = {kind: Side(kind, setting, folder, f"{folder}/{kind}", checkpointing) for kind in kinds}
        for side in sides.values():
            side.step()
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(pairs):
            for kind, side in sides.items():
                times[kind].append(side.step())
    result = {
        "row": name,
        "tokens_trl": sides["trl"].tokens,
        "tokens_ours": sides["ours"].tokens,
        "limit": sides["trl"].tokens / sides["ours"].tokens,
        "seconds": times,
        "speedup": spread([a / b for a, b in zip(times["trl"], times["ours"], strict=True)]),
    }
    result["share_of_limit"] = result["speedup"]["median"] / result["limit"]
    if setting.with_cache:
        pairs_of_times = zip(times["ours"], times["cached"], strict=True)
        result["speedup_of_cache"] = spread([ours / cached for ours, cached in pairs_of_times])
    if with_memory and setting.with_cache:
        result["peak_mib"] = {kind: peak_memory(name, kind, checkpointing) for kind in kinds}
    return result


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def peak_memory(name: str, kind: str, checkpointing: bool) -> float:
    """MiB that a step needs above model, optimiser state and batch."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.dpo_speed",
        "--memory_of",
        name,
        kind,
        *(["--checkpointing"] if checkpointing else []),
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_memory(name: str, kind: str, checkpointing: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_model(ROWS[name].family, folder)
        side = Side(kind, ROWS[name], folder, f"{folder}/out", checkpointing)
        side.step()  # makes the optimiser's state
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of imports and loading
        before = resident("VmRSS")
        side.step()
        print(resident("VmHWM") - before)


def resident(name: str) -> float:
    """MiB of this process's memory: now (`VmRSS`) or at most (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--pairs", type=int, default=5, help="how many steps of each trainer are compared")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing, as TRL's default")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    flash_stand_in.install()
    if args.memory_of:
        print_memory(*args.memory_of, args.checkpointing)
        return
    facts = {"torch": torch.__version__, "trl": trl.__version__, "transformers": transformers.__version__}
    facts |= {"threads": 1, "cores": os.cpu_count(), "load": os.getloadavg(), "pairs": args.pairs}
    facts["checkpointing"] = args.checkpointing
    results = []
    for name in args.rows:
        result = measure(name, args.pairs, args.checkpointing, not args.no_memory)
        results.append(result)
        print(
            f"{name}: {shown(result['speedup'])} times, limit {result['limit']:.2f}; cached reference "
            f"{shown(result.get('speedup_of_cache'))} times more; peak memory {result.get('peak_mib', '-')}",
            flush=True,
        )
        if args.output:
            args.output.write_text(json.dumps({"settings": facts, "results": results}, indent=2) + "\n")
            args.output.with_suffix(".md").write_text(table(results, facts))


def table(results: list[dict], facts: dict) -> str:
    """The results for people."""
    lines = [
        "# Speed of a DPO step",
        "",
        f"A whole optimiser step beside one of plain TRL {facts['trl']}: median of {facts['pairs']} "
        "paired steps (least to most), in CPU seconds. The limit counts the tokens that the language model computes: "
        "TRL's with padding, ours without it and with each prompt once. Images that are seen once come on top, which "
        f"is how a ratio can exceed it. {facts['threads']} thread, torch {facts['torch']}, gradient checkpointing "
        f"{'on' if facts['checkpointing'] else 'off'}, models of width 384 and six layers with random weights. "
        '"Variable length" is the path of FlashAttention, with kernels for the CPU that call SDPA for one sequence '
        "after the other, in both trainers: no GPU was there. "
        f"Load when it began: {facts['load'][0]:.0f} on {facts['cores']} cores. {facts.get('note', '')}"
        f"`python -m benchmarks.speed.dpo_speed --pairs {facts['pairs']} --output docs/results/dpo_speed.json`",
        "",
        "| batch | tokens TRL | tokens ours | faster | limit | cached reference | MiB TRL, ours, cached |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        memory = ", ".join(f"{value:.0f}" for value in result.get("peak_mib", {}).values()) or "-"
        lines.append(
            f"| {result['row']} | {result['tokens_trl']} | {result['tokens_ours']} | {shown(result['speedup'])} | "
            f"{result['limit']:.2f} | {shown(result.get('speedup_of_cache'))} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def shown(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['median']:.2f} ({values['least']:.2f} to {values['most']:.2f})"


if __name__ == "__main__":
    main()
