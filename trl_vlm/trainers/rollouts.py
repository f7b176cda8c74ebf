"""What PPO does to datasets, images and reward functions before TRL sees them."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from trl_vlm.data.images import load_image
from trl_vlm.data.rows import check_rows, row_images, with_row_numbers, with_undecoded_images
from trl_vlm.models.processors import load_processor
from trl_vlm.rewards import RewardModelReward, checked


Rows = Dataset | IterableDataset
RewardFunction = str | PreTrainedModel | Callable[..., list[float | None]]

ROW_NUMBER = "row_number"


def rollout_rows(dataset: Rows | dict[str, Rows] | None, name: str) -> Rows | dict[str, Rows] | None:
    """The dataset, checked, with numbered rows and images that are decoded where a rollout needs them.

    Raises:
        ValueError, TypeError: a column is missing, a row breaks the contract, or there is no row.
    """
    if isinstance(dataset, dict):
        return {key: rollout_rows(rows, key) for key, rows in dataset.items()}
    if dataset is None or not isinstance(dataset, Dataset | IterableDataset):
        return dataset  # TRL says what is wrong with it
    check_rows(dataset, required=["prompt"], name=name)
    return with_row_numbers(with_undecoded_images(dataset), ROW_NUMBER)


def with_decoded_images(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a rollout with `images` as RGB images; each image is named by its row if it is broken."""
    if not any("images" in row or "image" in row for row in rows):
        return list(rows)
    decoded = []
    for row in rows:
        name = f"row {row.get(ROW_NUMBER, '?')}"
        images = [
            load_image(image, name=f"{name}, image {index}") for index, image in enumerate(row_images(row, name))
        ]
        decoded.append({**{key: value for key, value in row.items() if key != "image"}, "images": images})
    return decoded


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
