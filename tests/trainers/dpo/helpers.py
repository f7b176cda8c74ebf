"""Short DPO trainings of tiny models, with TRL's trainer or ours, and how their logs differ."""

from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig

from tests.families import load_processor, saved
from tests.preference_rows import preference_rows
from trl_vlm.models.reply_ends import with_reply_ends

TIMES = ("runtime", "second", "epoch", "step", "learning_rate")
# With shared prefixes, what a step of Adam makes of rounding: relative, and for values near zero absolute.
EXACT, SHARED = 0.0, 1e-4


@cache
def rows(images: tuple[int, ...] = (1, 2, 0, 1)) -> Dataset:
    """Pairs with these numbers of images."""
    return preference_rows(list(images)).remove_columns(["facts", "margin"])


def with_weights(pairs: Dataset) -> Dataset:
    """The pairs with spans, some of which have weights, and with a weight for each rejected reply."""
    spans: list[Any] = [[[0.0, 1.0], [2.0, 5.0, 4.0]], [], None, [[0.0, 5.0, 0.5]]]
    weights = [0.5, 2.0, 1.0, 1.5]
    pairs = pairs.add_column("chosen_spans", [spans[row % 4] for row in range(len(pairs))])
    return pairs.add_column("rejected_score_weight", [weights[row % 4] for row in range(len(pairs))])


@cache
def text_rows() -> Dataset:
    """The same pairs without an images column."""
    return rows().remove_columns("images")


def lora(targets: Any = "all-linear") -> LoraConfig:
    """A small adapter; not random in both factors, so that the first loss is ln 2."""
    return LoraConfig(r=4, lora_alpha=16, target_modules=targets, exclude_modules=["lm_head"])


def make(
    trainer: type, config: type, folder: Path, family: str = "llava", data: Dataset | None = None, **options: Any
):
    """A trainer for `options`, which go to the trainer or into its arguments."""
    model = saved(family, sharp=4.0)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    more = {
        name: options.pop(name)
        for name in ("peft_config", "eval_dataset", "ref_model", "model", "pair_source", "pair_loss", "callbacks")
        if name in options
    }
    processor = options.pop("processing_class", None)
    settings = {
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_length": None,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return trainer(
        more.pop("model", str(model)),
        args=config(str(folder), **settings | options),
        train_dataset=rows() if data is None else data,
        processing_class=processor or with_reply_ends(load_processor(model)),
        **more,
    )


def logs(trainer: Any) -> list[dict[str, float]]:
    """One dictionary per step: the loss, the norm of the gradient, and every metric."""
    trainer.train()
    return [
        {key: value for key, value in entry.items() if not any(time in key for time in TIMES)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def begin_epoch(trainer: Any) -> None:
    """What a training does at the beginning of an epoch, for the draws of the collator."""
    trainer._epoch_draws.on_epoch_begin(trainer.args, trainer.state, trainer.control)


def losses(trainer: Any) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in logs(trainer)]


def largest_difference(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> tuple[float, str]:
    """The largest difference of two logs and the metric that has it; relative above 1."""
    assert len(found) == len(wanted) > 0
    assert found[0].keys() == wanted[0].keys()
    return max(
        (abs(one[key] - other[key]) / max(1.0, abs(other[key])), key)
        for one, other in zip(found, wanted, strict=True)
        for key in other
    )
