"""The check of supervised rows with images, in both of TRL's conversational forms."""

from collections.abc import Iterable
from typing import Any, cast

from datasets import Dataset

from trl_vlm.data.named_rows import has_images, without_images
from trl_vlm.data.rows import Row, faults
from trl_vlm.models.image_tokens import image_tokens
from trl_vlm.trainers.types import Processor


def check_supervised_rows(dataset: Any, name: str, processor: Processor) -> None:
    """Checks every row of a dataset with images, without decoding one; streamed rows are checked batch by batch.

    Args:
        dataset: The rows, or several datasets by name.
        name: What it is called in errors.
        processor: The model's, which knows what stands for an image in a text.

    Raises:
        RowError: A row breaks the contract.
    """
    if isinstance(dataset, dict):
        for key, rows in dataset.items():
            check_supervised_rows(rows, str(key), processor)
    elif isinstance(dataset, Dataset) and has_images(dataset):
        tokens = image_tokens(processor)
        for index, row in enumerate(cast(Iterable[Row], without_images(dataset))):
            check_supervised_row(row, f"{name} row {index}", tokens)


def check_supervised_row(row: Row, name: str, tokens: Iterable[str]) -> None:
    """Raises the first fault of a row with images that training could not live with.

    Rows without messages (TRL's standard form, whose texts spell the image tokens out) are left to TRL.

    Args:
        row: `prompt` and `completion`, or `messages`.
        name: What it is called in errors.
        tokens: What stands for an image in a text.

    Raises:
        RowError: Naming the row and the column.
    """
    is_whole = "messages" in row
    if not is_whole and (
        "completion" not in row or all(isinstance(row.get(c), str) for c in ("prompt", "completion"))
    ):
        return
    for fault in faults(row, "sft", image_tokens=tokens, with_images=True):
        if not fault.is_warning:
            raise fault.error(name)
