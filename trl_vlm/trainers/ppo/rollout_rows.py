"""What PPO does to datasets and images before TRL sees them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin, Trainer

from trl_vlm.data.images import load_image
from trl_vlm.data.messages import message_text
from trl_vlm.data.named_rows import check_rows, named_rows
from trl_vlm.data.rows import ROW_NAME, row_images
from trl_vlm.models.image_tokens import image_token_id

Rows = Dataset | IterableDataset
# What a forward pass needs beside token ids, under the names that TRL gives them in a rollout.
IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


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


def check_enough_rows(dataset: Any, prompts: int) -> None:
    """Refuse a dataset that does not fill one rollout: TRL drops incomplete ones, and would train on nothing.

    Args:
        dataset: the training rows; a streamed one is not checked.
        prompts: how many different prompts a rollout holds, on all processes.
    """
    if isinstance(dataset, Dataset) and len(dataset) < prompts:
        raise ValueError(
            f"The train dataset has {len(dataset)} rows, and one rollout takes {prompts} prompts. Add rows, or lower "
            "`per_device_train_batch_size`, `gradient_accumulation_steps` or `num_mini_batches`."
        )


def prepared_rows(rows: Sequence[dict[str, Any]], processor: Any) -> list[dict[str, Any]]:
    """The rows of a rollout as TRL takes them: images decoded, as many as the prompt has places for.

    Args:
        rows: what the data loader hands over.
        processor: the policy's processor or tokenizer.

    Raises:
        ValueError: naming the row.
    """
    token = None
    if isinstance(processor, ProcessorMixin):
        token = processor.tokenizer.convert_ids_to_tokens(image_token_id(processor))
    return [_prepared_row(row, token) for row in rows]


def _prepared_row(row: dict[str, Any], image_token: str | None) -> dict[str, Any]:
    row = dict(row)
    name = row.pop(ROW_NAME, "a row")
    if isinstance(row.get("prompt"), list):
        row["prompt"] = [_without_empty_keys(message) for message in row["prompt"]]
    if "image" not in row and "images" not in row:
        return row
    images = row_images(row, name)
    row.pop("image", None)
    row["images"] = [load_image(image, name=f"{name}, image {index}") for index, image in enumerate(images)]
    _check_places(row["prompt"], len(images), image_token, name)
    return row


def refuse_mixed_rows(rows: Sequence[dict[str, Any]], trainer: Trainer) -> None:
    """With several processes under DeepSpeed or FSDP, stop where they would wait for each other, or mix up gradients.

    Where a process has no image, its vision tower has no gradients. DDP is told so; the others exchange parameters and
    gradients in the order in which they come, and take for granted that it is the same on all processes.

    Raises:
        RuntimeError: some rows of the rollout, on whatever process, have images and others have none.
    """
    fixed_order = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if not fixed_order or trainer.accelerator.num_processes == 1:
        return
    counts = torch.tensor([[sum(bool(row.get("images")) for row in rows), len(rows)]], device=trainer.args.device)
    with_images, every = trainer.accelerator.gather(counts).sum(0).tolist()
    if 0 < with_images < every:
        raise RuntimeError(
            f"{with_images} of the {every} rows of a rollout have images. Under DeepSpeed and FSDP all processes must "
            "run the vision tower together. Train on rows with and without images in separate runs, or under DDP."
        )


def _without_empty_keys(message: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives every part of a message the keys of all parts; TRL takes `image: None` for an image."""
    if not isinstance(message.get("content"), list):
        return message
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    return {**message, "content": parts}


def _check_places(prompt: Sequence[dict[str, Any]], images: int, image_token: str | None, name: str) -> None:
    """Images go to the places that the messages name; where none does, TRL puts them before the first user turn."""
    parts = [part for message in prompt if isinstance(message["content"], list) for part in message["content"]]
    places = sum(part.get("type") == "image" and "image" not in part for part in parts)
    # A user turn that is a string takes all the images.
    takes_all = any(message["role"] == "user" and isinstance(message["content"], str) for message in prompt)
    if places != images and not (takes_all and places == 0):
        raise ValueError(
            f"{name}: its prompt has {places} image placeholders for {images} image(s). Write one "
            "{'type': 'image'} per image, or write the content as a string: images then go before the text."
        )
    if image_token is not None and any(image_token in message_text(message) for message in prompt):
        raise ValueError(
            f"{name}: the text of its prompt holds {image_token!r}, which stands for an image. Remove it from the "
            "text: images go before the first user turn, or where a part {'type': 'image'} stands."
        )


def without_empty_images(model: Callable[..., Any]) -> Callable[..., Any]:
    """`model`, called without image inputs where none of the rows that TRL hands it has an image.

    A mini-batch of text-only rows comes with the zero images that are its share of the rollout's, or (Idefics3,
    SmolVLM) with one image of nothing but padding for each row; models fail at both.
    """

    def forward(**inputs: Any) -> Any:
        pixels, padding = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
        if pixels is not None and (len(pixels) == 0 or (padding is not None and not padding.any())):
            inputs = {key: v for key, v in inputs.items() if key not in IMAGE_INPUTS or key in _PER_TOKEN}
        return model(**inputs)

    return forward
