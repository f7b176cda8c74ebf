"""What `tests.distributed.launch` runs: DPO, reward training, PPO and SFT, full and with LoRA, one after the other.

Each run reports its losses, the norms of its gradients, and the precisions of what its losses read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Trainer

from tests.families import load_processor
from tests.preference_rows import preference_rows
from tests.trainers.dpo import helpers as dpo
from tests.trainers.ppo import helpers as ppo
from trl_vlm import DPOConfig, DPOTrainer, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

OUTPUTS = ("log_probs", "logits", "token_values")
IMAGES = (1, 2, 1, 1)
# The image side of preference, with draws of every epoch.
ADDITIONS = {"image_weight": 1.0, "image_corruption": "noise", "anchor_weight": 0.5}


def settings(folder: Path, batch: int, adapter: bool, **trainer_arguments: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **trainer_arguments,
    }


def make(method: str, model: Any, folder: str, adapter: bool, options: dict[str, Any]) -> Trainer:
    peft_config = dpo.lora() if adapter else None
    processor = load_processor(folder)
    if method in ("dpo", "dpo additions"):
        # TRL takes reentrant checkpointing for adapters under ZeRO-3, which the image pair refuses.
        more = ADDITIONS | {"gradient_checkpointing": not adapter} if method == "dpo additions" else {}
        args = DPOConfig(**options, **more, max_length=None, dense_preset="paper")
        rows = dpo.with_weights(dpo.rows(IMAGES)) if more else dpo.rows(IMAGES)
        return DPOTrainer(model, args=args, train_dataset=rows, processing_class=processor, peft_config=peft_config)
    if method == "reward":
        args = RewardConfig(**options)
        return RewardTrainer(folder, args, train_dataset=preference_rows(list(IMAGES)), peft_config=peft_config)
    if method == "sft":
        pairs = dpo.rows(IMAGES)
        supervised = pairs.rename_column("chosen", "completion").remove_columns("rejected")
        args = SFTConfig(**options, max_length=None)
        return SFTTrainer(model, args, train_dataset=supervised, processing_class=processor, peft_config=peft_config)
    args = ppo.settings(
        **{"folder": options.pop("output_dir"), **options},
        shuffle_dataset=False,
        num_ppo_epochs=3,  # one rollout: a rounding would change the replies of the next one
        generation_kwargs={"do_sample": False},  # so that replies do not depend on the number of processes
    )
    return PPOTrainer(
        model,
        reward_funcs=ppo.reward_each_token if method == "ppo tokens" else ppo.count_letters,
        args=args,
        train_dataset=ppo.rows(list(IMAGES)),
        processing_class=processor,
        peft_config=peft_config,
    )


def watched(trainer: Trainer) -> dict[str, set[str]]:
    """The precisions of what the wrapped model gives, while training."""
    found: dict[str, set[str]] = {}

    def note(_: Any, __: Any, ___: Any, output: Any) -> None:
        for name in OUTPUTS:
            value = output.get(name) if isinstance(output, dict) else None
            if isinstance(value, torch.Tensor):
                found.setdefault(name, set()).add(str(value.dtype).removeprefix("torch."))

    trainer.model.register_forward_hook(note, with_kwargs=True)
    return found


def main(
    folder: Path,
    trainer_arguments: dict[str, Any],
    model: str,
    batch: int,
    runs: Sequence[str],
    resumed: Sequence[str] = (),
):
    """The runs that are `resumed` run to their end, and then once more from a checkpoint before the last step."""
    report: dict[str, Any] = {}
    again = [f"{name} again" for name in resumed]
    for name in (*runs, *again):
        method, kind = name.removesuffix(" again").rsplit(" ", 1)
        adapter = kind == "lora"
        options = settings(folder / f"{method}_{kind}".replace(" ", "_"), batch, adapter, **trainer_arguments)
        if name in resumed or name in again:
            options |= {"save_strategy": "steps", "save_steps": 2}
        # TRL seeds, loads, then draws the adapter; with ZeRO-3, loading draws other numbers.
        loaded = AutoModelForImageTextToText.from_pretrained(model) if adapter else model
        trainer = make(method, loaded, model, adapter, options)
        dtypes = watched(trainer)
        checkpoint = f"{trainer.args.output_dir}/checkpoint-2"
        trainer.train(checkpoint if name in again else None)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        report[name] = {
            "loss": [entry["loss"] for entry in logs],
            "grad_norm": [entry["grad_norm"] for entry in logs],
            "dtypes": {output: sorted(found) for output, found in dtypes.items()},
            "margin": [entry.get("rewards/margins", entry.get("margin", entry.get("ppo/kl"))) for entry in logs],
        }
    return trainer, report
