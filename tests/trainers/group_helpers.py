"""What the tests of shared groups have in common: trainers of ours and of TRL, their logs, weights and passes."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

import trl_vlm
from tests import families
from tests.trainers.ppo.helpers import count_letters, rows
from trl_vlm.models.families import TOWERS
from trl_vlm.models.processors import load_processor
from trl_vlm.models.reply_ends import with_reply_ends

LOGGED = ("loss", "grad_norm", "reward", "kl", "ppo/kl", "ppo/value_loss", "ppo/value_mean")


def make(
    method: str,
    folder: Any,
    family: str = "llava",
    *,
    module: Any = trl_vlm,
    images: tuple[int, ...] = (1, 2),
    peft: Any = None,
    more: dict[str, Any] | None = None,
    path: str | None = None,
    **options: Any,
) -> Any:
    """A trainer of `module` whose groups hold four replies; SGD, because Adam makes much of rounding."""
    path = path or families.saved(family, sharp=6.0)
    config = AutoConfig.from_pretrained(path)
    placeholders = [config.image_token_id, getattr(config, "video_token_id", None)]  # a random model may say them
    settings = {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "generation_kwargs": {"suppress_tokens": [token for token in placeholders if token is not None]},
        **options,
    }
    return getattr(module, f"{method}Trainer")(
        str(path),
        args=getattr(module, f"{method}Config")(output_dir=str(folder), **settings),
        train_dataset=rows(list(images)),
        processing_class=with_reply_ends(load_processor(path, padding_side="left", truncation_side="left")),
        peft_config=peft,
        **{"reward_funcs": count_letters, **(more or {})},
    )


def logged(trainer: Any) -> dict[str, list[float]]:
    """What each step has logged, by name."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in steps if name in entry] for name in LOGGED if name in steps[0]}


def weights(trainer: Any) -> dict[str, Tensor]:
    """Copies of what trains."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def count_tower_passes(model: nn.Module) -> list[int]:
    """A list that grows by the number of pixels of each pass of the vision tower."""
    tower = next(part for name, part in model.named_modules() if name.split(".")[-1] in TOWERS)
    seen: list[int] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pixels = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen.append(pixels.numel())

    tower.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def count_passes(model: nn.Module) -> list[int]:
    """A list that grows by the number of sequences of each pass of the language model."""
    layers = next(part for name, part in model.named_modules() if name.endswith("language_model.layers"))
    seen: list[int] = []
    layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].size(0)))
    return seen


def reply_ids(batch: dict[str, Any]) -> Tensor:
    """Prompts and replies of a rollout, (B, T)."""
    return torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
