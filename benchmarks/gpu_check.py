"""What trl_vlm does on a real GPU: whether it is right, how fast it is, how much memory it takes.

    python -m benchmarks.gpu_check --output gpu.json
    python -m benchmarks.gpu_check --only sdpa,dpo --shapes 2b
    python -m benchmarks.gpu_check --tiny

No network: the models are random, of real shapes; `--tiny` runs the same code on a CPU. A part that fails is reported
as an error, and the next one runs. The report is written after each part. The part `qlora` needs bitsandbytes, the
rows "flash" need flash_attn, and `multi_gpu` two GPUs.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
import trl

import trl_vlm
from benchmarks.gpu.measuring import (
    DEVICE,
    HAS_GPU,
    clean,
    clock_calls,
    host_waits,
    milliseconds,
    peak_gib,
    seconds_of,
    trained,
)
from benchmarks.gpu.models import END, PATCH, PROMPT_WORDS, SHAPES, lora, model, processor, rows
from trl_vlm.models.prefix_sharing.attention import ATTENTION, LAYOUT, empty_mask
from trl_vlm.models.prefix_sharing.masks import layout_of
from trl_vlm.models.prefix_sharing.packing import packing
from trl_vlm.models.prefix_sharing.sharing import SHARED_PREFIX, share_prefix
from trl_vlm.models.prefix_sharing.varlen import runs_here
from trl_vlm.pairs import BDHS, Policy
from trl_vlm.rewards import RewardModelReward

OPTIONAL = ("bitsandbytes", "flash_attn", "kernels", "deepspeed", "vllm")


@dataclass
class Setting:
    """How large everything is.

    Args:
        shape: Of the parts that run with one shape.
        shapes: Of the part `dpo`.
        batch: Pairs per step.
        reply: Tokens per reply.
        size: Height and width of the images.
        rank: Of LoRA.
    """

    shape: str
    shapes: list[str]
    batch: int
    reply: int
    size: int = 336
    rank: int = 64

    @property
    def prompt(self) -> int:
        """Tokens of a prompt: image, words, and four of the chat template."""
        return (self.size // PATCH) ** 2 + PROMPT_WORDS + 4


def options(folder: str, batch: int, steps: int, **more: Any) -> dict[str, Any]:
    """Arguments of every trainer."""
    precision = {"bf16": True} if HAS_GPU else {"bf16": False, "use_cpu": True}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    sizes = {"per_device_train_batch_size": batch, "max_steps": steps, "learning_rate": 1e-5}
    return {"output_dir": folder, **precision, **quiet, **sizes, **more}


# Parts


def environment(setting: Setting) -> dict[str, Any]:
    """Versions, the GPU, and how fast it multiplies."""
    packages = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    report = {"torch": torch.__version__, "cuda": torch.version.cuda, "packages": packages}
    report |= {"transformers": transformers.__version__, "trl": trl.__version__, "trl_vlm": trl_vlm.__version__}
    if HAS_GPU:
        report |= {"gpu": torch.cuda.get_device_name(), "gib": torch.cuda.get_device_properties(0).total_memory >> 30}
        square = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
        report["bf16_tflops"] = round(2 * 8192**3 / milliseconds(lambda: square @ square) * 1e3 / 1e12, 1)
    return report


def sdpa(setting: Setting) -> dict[str, Any]:
    """Attention of pairs that share their prompts: in padded calls, in one of variable length, and without sharing."""
    shape = SHAPES[setting.shape]
    prompt, reply, width = setting.prompt, setting.reply, shape.hidden // shape.heads
    attention_mask = torch.ones(2 * setting.batch, prompt + reply, dtype=torch.long)
    pairs = torch.arange(setting.batch).repeat(2)
    slots = packing(attention_mask, torch.stack([pairs, torch.full_like(pairs, prompt)], dim=1))
    config = transformers.LlavaConfig(attn_implementation="sdpa")
    layout = layout_of(config, slots, {"attention_mask": attention_mask.to(DEVICE)}, torch.bfloat16)
    layouts = {"padded_calls": layout._replace(flat=None), "variable_length": layout}

    def drawn(heads: int) -> torch.Tensor:
        size = (1, heads, len(slots.source), width)
        return torch.randn(size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    packed = drawn(shape.heads), drawn(shape.key_value_heads), drawn(shape.key_value_heads)
    target = slots.target.to(DEVICE)
    plain = [states[0][:, target].transpose(0, 1).detach().requires_grad_() for states in packed]
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, shape.heads // shape.key_value_heads
    attend, options = transformers.AttentionInterface()[ATTENTION], {"scaling": width**-0.5, "dropout": 0.0}

    def run(name: str, backward: bool = True) -> torch.Tensor:
        if name == "plain":
            states, mask, more = plain, None, {}
        else:
            states, mask, more = packed, empty_mask(target.device), {LAYOUT: layouts[name]}
        output, _ = attend(module, *states, mask, **options, **more)
        if backward:
            torch.autograd.grad(output.float().square().sum(), states)
        return output

    wanted = run("plain", False)
    found = {name: run(name, False)[0][target] for name in layouts}
    report = {f"ms_{name}": milliseconds(lambda name=name: run(name)) for name in (*layouts, "plain")}
    varlen = HAS_GPU and runs_here(target.device, torch.bfloat16, shape.heads, shape.key_value_heads, width)
    difference = max((states - wanted).detach().abs().max() for states in found.values())
    return report | {"tokens": len(slots.source), "varlen_runs": varlen, "largest_difference": float(difference)}


def _dpo(
    setting: Setting, ours: bool, shape: str, attention: str | None = None, steps: int = 8, **more: Any
) -> dict[str, Any]:
    """A few steps of DPO with TRL's trainer or ours."""
    package = trl_vlm if ours else trl
    batch = setting.batch
    with tempfile.TemporaryDirectory() as folder:
        trainer = package.DPOTrainer(
            model=model(shape, setting.size, DEVICE, attention),
            args=package.DPOConfig(**options(folder, batch, steps, max_length=None, **more)),
            train_dataset=rows(batch * steps, setting.reply, setting.size),
            processing_class=processor(setting.size),
            peft_config=lora(setting.rank),
        )
        report = trained(trainer)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        report["host_waits_per_forward"] = host_waits(lambda: trainer.compute_loss(trainer.model, dict(inputs)))
        parameters = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora" not in name)
    shares = ours and trainer._shares
    prompts = 1 if shares else 2
    tokens = batch * (prompts * setting.prompt + 2 * setting.reply)
    # Forward of policy and reference, recomputation, backward to activations: 2 N each.
    tflops = round(4 * 2 * parameters * tokens / report["seconds_per_step"] / 1e12, 1)
    return report | {"model_tflops": tflops} | ({"shares_prefix": shares} if ours else {})


def dpo(setting: Setting) -> dict[str, Any]:
    """Steps of TRL's trainer and of ours, with and without shared prefixes, with and without FlashAttention."""
    variants = {
        "trl": (False, None, {}),
        "ours": (True, None, {}),
        "ours_plain": (True, None, {"share_prefix": False}),
    }
    if HAS_GPU and importlib.util.find_spec("flash_attn") is not None:
        variants |= {"trl_flash": (False, "flash_attention_2", {}), "ours_flash": (True, "flash_attention_2", {})}
    report: dict[str, Any] = {}
    for shape in setting.shapes:
        for name, (ours, attention, more) in variants.items():
            report[f"{shape}/{name}"] = guarded(lambda: _dpo(setting, ours, shape, attention, **more))  # noqa: B023
        mine, theirs = report[f"{shape}/ours"], report[f"{shape}/trl"]
        if "error" not in mine and "error" not in theirs:
            report[f"{shape}/speedup"] = round(theirs["seconds_per_step"] / mine["seconds_per_step"], 3)
            pairs = zip(mine["first_losses"], theirs["first_losses"], strict=True)
            report[f"{shape}/largest_loss_difference"] = max(abs(one - other) for one, other in pairs)
    return report


def dense(setting: Setting) -> dict[str, Any]:
    """Dense DPO."""
    return _dpo(setting, True, setting.shape, steps=5, dense_preset="paper")


def cache(setting: Setting) -> dict[str, Any]:
    """DPO with the reference's log-probabilities on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return _dpo(setting, True, setting.shape, steps=5, reference_cache=folder)


def _saved(setting: Setting, folder: str) -> str:
    model(setting.shape, setting.size, DEVICE).save_pretrained(folder)
    processor(setting.size).save_pretrained(folder)
    return folder


def reward(setting: Setting) -> dict[str, Any]:
    """Reward training with shared prompts and without, and scoring in two precisions."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = _saved(setting, f"{folder}/base")
        for name, share in (("plain", False), ("shared", True)):
            args = trl_vlm.RewardConfig(
                **options(f"{folder}/{name}", setting.batch, 6, max_length=None, share_prefix=share),
                model_init_kwargs={"dtype": "bfloat16"},
            )
            trainer = trl_vlm.RewardTrainer(
                base,
                args,
                train_dataset=rows(6 * setting.batch, setting.reply, setting.size),
                processing_class=processor(setting.size),
                peft_config=lora(setting.rank),
            )
            heads = {str(p.dtype) for key, p in trainer.model.named_parameters() if "score" in key and p.requires_grad}
            report[name] = trained(trainer) | {"head_dtypes": sorted(heads)}
            trainer.save_model(f"{folder}/reward")
            del trainer
            clean()
        for dtype in ("bfloat16", "float32"):
            report[f"scoring_{dtype}"] = _scoring(setting, f"{folder}/reward", dtype)
    return report


def _scoring(setting: Setting, folder: str, dtype: str, replies: int = 16) -> dict[str, Any]:
    scorer, data = RewardModelReward(folder, dtype=dtype), rows(replies, setting.reply, setting.size)
    columns = (data["prompt"][:], data["chosen"][:], data["images"][:])
    clean()
    spent = milliseconds(lambda: scorer(*columns[:2], images=columns[2]), repeats=3, warmup=1)
    scores = scorer(*columns[:2], images=columns[2])
    speed = round(1000 * replies / spent, 1)
    return {"replies_per_second": speed, "peak_gib": peak_gib(), "different_scores": len(set(scores))}


def ppo(setting: Setting) -> dict[str, Any]:
    """PPO, and where a step's time goes."""

    def letters(completions: list, **columns: Any) -> list[float]:
        return [float(len(completion[0]["content"]) % 7) for completion in completions]

    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        args = trl_vlm.PPOConfig(
            **options(folder, setting.batch, 4, max_completion_length=setting.reply), num_ppo_epochs=2
        )
        trainer = trl_vlm.PPOTrainer(
            model(setting.shape, setting.size, DEVICE),
            reward_funcs=letters,
            args=args,
            train_dataset=rows(64, setting.reply, setting.size, "prompts"),
            processing_class=processor(setting.size),
            peft_config=lora(setting.rank),
        )
        for name in ("_generate", "_generate_and_score_completions", "_compute_loss"):
            clock_calls(trainer, name, seconds)
        report = trained(trainer, warmup=2)
    kinds = {str(p.dtype) for p in trainer.value_model.parameters() if p.requires_grad}
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    report |= {name: last[name] for name in ("ppo/kl", "ppo/value_loss") if name in last}
    report |= {"seconds": {name.strip("_"): spent[-4:] for name, spent in seconds.items()}}
    return report | {"critic_dtypes": sorted(kinds), "replies_per_rollout": args.generation_batch_size}


def bdhs(setting: Setting) -> dict[str, Any]:
    """Pairs per second of BDHS."""
    policy = Policy(model(setting.shape, setting.size, DEVICE), processor(setting.size))
    never_same = BDHS(
        lambda texts, others: [0.0] * len(texts),
        mask_ratio=0.99,
        max_new_tokens=setting.reply,
        max_sentence_tokens=max(setting.reply // 4, 4),
    )
    given = rows(16, setting.reply, setting.size, "completions")
    data = [{**row, "row_name": f"train row {number}"} for number, row in enumerate(given)]
    clean()
    never_same(data[:2], policy)
    pairs: list[Any] = []
    spent = seconds_of(lambda: pairs.extend(never_same(data, policy)))
    waits = host_waits(lambda: never_same(data[:4], policy))
    speed = round(len(data) / spent, 2)
    report = {"rows_per_second": speed, "pairs": sum(pair is not None for pair in pairs)}
    return report | {"peak_gib": peak_gib(), "host_waits_of_4_rows": waits}


def qlora(setting: Setting) -> dict[str, Any]:
    """DPO on a base in 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed"}
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder:
        base = _saved(setting, f"{folder}/base")
        clean()
        trainer = trl_vlm.DPOTrainer(
            base,
            args=trl_vlm.DPOConfig(
                **options(f"{folder}/out", 1, 5, max_length=None), model_init_kwargs={"dtype": "bfloat16"}
            ),
            train_dataset=rows(8, setting.reply, setting.size),
            processing_class=processor(setting.size),
            quantization_config=quantization,
            peft_config=lora(setting.rank),
        )
        return trained(trainer) | {"shares_prefix": trainer._shares}


def multi_gpu(setting: Setting) -> dict[str, Any]:
    """A shared prefix in a model that a device map spreads over the GPUs, against the same on one of them."""
    if torch.cuda.device_count() < 2:
        return {"skipped": f"{torch.cuda.device_count()} GPU(s)"}
    ids = torch.randint(END + 2, 900, (2, 20), device=0)
    ids[1, :10] = ids[0, :10]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), SHARED_PREFIX: torch.tensor([[0, 10], [0, 10]])}
    logits = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        _saved(setting, folder)
        for where in ("balanced", {"": 0}):
            made = transformers.AutoModelForImageTextToText.from_pretrained(folder, device_map=where, dtype="bfloat16")
            share_prefix(made)
            logits.append(made(**batch).logits.float().cpu())
    return {"largest_difference": float((logits[0] - logits[1]).abs().max())}


PARTS = {part.__name__: part for part in (environment, sdpa, dpo, dense, cache, reward, ppo, bdhs, qlora, multi_gpu)}


def guarded(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part reports, or how it failed."""
    try:
        return function()
    except Exception as error:  # whatever goes wrong on this machine, the other parts are to run
        return {"error": f"{type(error).__name__}: {str(error)[:500]}", "where": traceback.format_exc()[-1500:]}
    finally:
        clean()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--tiny", action="store_true", help="a tiny model, also on a CPU")
    command.add_argument("--only", default=",".join(PARTS), help="which parts, joined by commas")
    command.add_argument("--shape", default="2b", choices=SHAPES, help="of the parts that run with one shape")
    command.add_argument("--shapes", default="2b,7b", help="of the part dpo, joined by commas")
    command.add_argument("--batch", type=int, default=4, help="pairs per step")
    command.add_argument("--reply", type=int, default=128, help="tokens per reply")
    command.add_argument("--budget", type=float, default=470, help="seconds after which no part starts")
    command.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="the report")
    return command


def main() -> int:
    """Runs the parts; 1 if one failed."""
    given = parser().parse_args()
    unknown = [name for name in given.only.split(",") if name not in PARTS]
    if unknown:
        sys.exit(f"There is no part {', '.join(unknown)}. The parts are {', '.join(PARTS)}.")
    if not HAS_GPU and not given.tiny:
        sys.exit("No GPU is visible. `--tiny` runs the same code on a CPU.")
    setting = Setting(given.shape, given.shapes.split(","), given.batch, given.reply)
    if given.tiny:
        setting = Setting("tiny", ["tiny"], batch=2, reply=12, size=56, rank=8)
    start, report = time.perf_counter(), {}
    for name in given.only.split(","):
        begun = time.perf_counter() - start
        found = {"skipped": "budget"} if begun > given.budget else guarded(lambda: PARTS[name](setting))  # noqa: B023
        report[name] = found | {"part_seconds": round(time.perf_counter() - start - begun, 1)}
        given.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"{name}: {json.dumps(report[name])[:1500]}\n")
    return int(any("error" in json.dumps(list(found)) for found in report.values()))


if __name__ == "__main__":
    sys.exit(main())
