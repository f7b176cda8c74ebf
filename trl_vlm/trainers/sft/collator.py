"""Batches of supervised rows: images decoded here, and no row whose reply was cut off."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trl_vlm.data.errors import RowError
from trl_vlm.data.images import load_image
from trl_vlm.data.messages import without_empty_keys
from trl_vlm.data.rows import ROW_NAME, Row, name_of, row_images
from trl_vlm.trainers.sft.rows import check_supervised_row

IGNORED_LABEL = -100


class SupervisedCollator:
    """TRL's collator for rows with names and undecoded images, and a guard against rows that train nothing.

    Where `max_length` cuts a row's whole reply, no label is left. TRL then silently trains on a loss of 0.0.

    Args:
        collate: TRL's collator, which makes `labels`.
        max_length: Length to which rows are cut; None cuts none.
        image_tokens: What stands for an image in a text, and must not be spelled out.
        first_reply_ends_prefix: From the first trained token on, a conversation is read causally: where a family reads
            a prompt in both directions (PaliGemma), a conversation encoded as a whole would be all prompt, and each
            token of a reply would see the ones that follow it.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        max_length: int | None,
        image_tokens: Sequence[str] = (),
        first_reply_ends_prefix: bool = False,
    ):
        self.collate, self.max_length, self.image_tokens = collate, max_length, tuple(image_tokens)
        self.first_reply_ends_prefix = first_reply_ends_prefix

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch of `rows`, which are not modified.

        Raises:
            RowError: A row or an image is bad, or no label of a row is left.
        """
        names = [name_of(row, place, " of the batch") for place, row in enumerate(rows)]
        for row, name in zip(rows, names, strict=True):
            check_supervised_row(row, name, self.image_tokens)
        batch = self.collate([_with_images(row, name) for row, name in zip(rows, names, strict=True)])
        is_label = batch["labels"] != IGNORED_LABEL
        if self.first_reply_ends_prefix and "token_type_ids" in batch:
            batch["token_type_ids"] = batch["token_type_ids"].masked_fill(is_label.cumsum(-1) > 0, 1)
        is_trained = is_label.any(-1).tolist()
        for name, has_labels in zip(names, is_trained, strict=True):
            if not has_labels:
                raise RowError(f"{name}: {self._reason()}", "nothing to train on")
        return batch

    def _reason(self) -> str:
        if self.max_length is None:
            return "no token of it is trained on. Does its reply hold any text? Give it one, or drop the row."
        return (
            f"`max_length={self.max_length}` cuts off its whole reply, so nothing of it would be trained (loss 0.0). "
            "Image tokens count too: raise `max_length` or set it to None, use smaller images, or drop the row."
        )


def _with_images(row: Row, name: str) -> dict[str, Any]:
    """The row without its name and with decoded images, as TRL's collator takes it."""
    kept = {key: value for key, value in row.items() if key != ROW_NAME}
    for column in ("prompt", "completion", "messages"):
        if isinstance(kept.get(column), list):
            kept[column] = without_empty_keys(kept[column])
    images = [load_image(image, name=f"{name}, image {place}") for place, image in enumerate(row_images(row, name))]
    if row.get("image") is not None:
        return {**kept, "image": images[0]}
    return {**kept, "images": images}
