"""How a `DPOTrainer` gets its batches where a source makes the pairs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer

from trl_vlm.trainers.dpo.collator import PreferenceBatch
from trl_vlm.trainers.dpo.fresh_pairs import FreshPairs, MicroBatch, has_pair, without_replies


class PairedTrainer(Trainer):
    """Overrides of `Trainer` for a source of pairs: a mixin before TRL's trainer. Without a source it changes nothing.

    Attributes:
        _pair_maker: Makes the pairs of each step; None without a source.
    """

    data_collator: Callable[[list[Any]], Any]
    _is_vision_dataset: bool
    _pair_maker: FreshPairs | None = None

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of an optimizer step; with a source, each knows the rows of the whole step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._pair_maker is not None:
            batches = [MicroBatch(batches, place) for place in range(len(batches))]
        return batches, items

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        # Pairs are made here and not in `get_batch_samples`: by now the model is in training mode, and a resumed run
        # has its random numbers back.
        if self._pair_maker is not None and isinstance(inputs, MicroBatch):
            inputs = {**self._pair_maker.micro_batch(inputs)}
        elif self._pair_maker is not None and isinstance(inputs, list):
            inputs = {**self._pair_maker.batch(inputs)}
        return super()._prepare_inputs(inputs)

    def prompt_batch(self, rows: list[dict[str, Any]]) -> PreferenceBatch:
        """A batch that begins with the prompts of `rows`, followed by any replies."""
        collate = self.data_collator if self._pair_maker is None else self._pair_maker.collated
        has_replies = [not self._is_vision_dataset or has_pair(row) for row in rows]
        return collate([row if has else without_replies(row) for row, has in zip(rows, has_replies, strict=True)])
