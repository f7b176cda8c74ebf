"""What PPO does to datasets, images and reward functions before TRL sees them."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from trl_vlm.data.images import load_image
from trl_vlm.data.rows import ROW_NAME, check_rows, named_rows, row_images
from trl_vlm.models.processors import load_processor
from trl_vlm.rewards import RewardModelReward, checked


Rows = Dataset | IterableDataset
RewardFunction = str | PreTrainedModel | Callable[..., list[float | None]]


def check_rollout_rows(dataset: Rows | dict[str, Rows] | None, name: str) -> None:
    """Check that every row has a prompt and keeps the row contract; TRL says what is wrong with other types.

    Raises:
        ValueError, TypeError: a column is missing, a row breaks the contract, or there is no row.
    """
    for key, rows in dataset.items() if isinstance(dataset, dict) else [(name, dataset)]:
        if isinstance(rows, Dataset | IterableDataset):
            check_rows(rows, required=["prompt"], name=key)


def rollout_rows(dataset: Any, name: str) -> Any:
    """The dataset with named rows and images that are decoded where a rollout needs them."""
    if isinstance(dataset, dict):
        return {key: rollout_rows(rows, key) for key, rows in dataset.items()}
    return dataset if dataset is None else named_rows(dataset, name)


def with_decoded_images(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a rollout with `images` as RGB images; a broken one is named by its row."""
    return [_with_decoded_images(row) for row in rows]


def _with_decoded_images(row: dict[str, Any]) -> dict[str, Any]:
    row = dict(row)
    name = row.pop(ROW_NAME, "a row")
    if "image" not in row and "images" not in row:
        return row
    images = row_images(row, name)
    row.pop("image", None)
    row["images"] = [load_image(image, name=f"{name}, image {index}") for index, image in enumerate(images)]
    return row


def load_policy_processor(model: str | PreTrainedModel | PeftModel, trust_remote_code: bool) -> ProcessorMixin | None:
    """The processor (or tokenizer) of the policy; None leaves the loading to TRL."""
    path = model if isinstance(model, str) else model.config._name_or_path
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code) if path else model.config
    if not path or not hasattr(config, "vision_config"):
        return None
    return load_processor(path, padding_side="left", truncation_side="left", trust_remote_code=trust_remote_code)


def reward_functions(
    given: RewardFunction | list[RewardFunction] | None,
    reward_model: str | PreTrainedModel | PeftModel | None,
    processor: PreTrainedTokenizerBase | ProcessorMixin | None,
) -> list[RewardFunction]:
    """TRL reward functions that fail on a value which is no reward, `reward_model` last.

    A vision-language reward model becomes a `RewardModelReward`: TRL would show it the text alone.
    """
    functions = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    functions += [] if reward_model is None else [reward_model]
    if not functions:
        raise ValueError("PPO has no reward: pass `reward_funcs`, `reward_model`, or both.")
    functions = [_seeing(function, processor) for function in functions]
    return [checked(f) if callable(f) and not isinstance(f, PreTrainedModel) else f for f in functions]


def _seeing(function: RewardFunction, processor: Any) -> RewardFunction:
    if isinstance(function, str):
        is_vlm = hasattr(AutoConfig.from_pretrained(function), "vision_config")
        return RewardModelReward(function) if is_vlm else function
    if isinstance(function, PreTrainedModel | PeftModel) and hasattr(function.config, "vision_config"):
        return RewardModelReward(function, processor=processor)
    return function
