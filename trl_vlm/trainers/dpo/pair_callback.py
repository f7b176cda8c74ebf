"""Pairs that are regenerated every few steps or each epoch, for our `DPOTrainer` and for TRL's."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import trl
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_vlm.data.named_rows import NamedRows, check_rows, named_rows
from trl_vlm.data.rows import PAIR_COLUMNS, Row
from trl_vlm.pairs.source import PAIR_BATCH_SIZE, PairSource
from trl_vlm.pairs.vllm import VLLMOptions
from trl_vlm.trainers.dpo.fresh_pairs import (
    COLLATED_COLUMNS,
    made_pairs,
    pair_statistics,
    refuse_virtual_tokens,
    sampling_policy,
    total_statistics,
)
from trl_vlm.trainers.dpo.pairs_data import extra_replies
from trl_vlm.trainers.dpo.trainer import DPOTrainer
from trl_vlm.trainers.dpo.vllm import VLLMReplies, check_vllm
from trl_vlm.trainers.types import Model

logger = logging.getLogger(__name__)


class RefreshedRows(TorchDataset):
    """A view of a dataset that serves the most recently generated pairs.

    A row that never had a pair is replaced by another row, so that every batch is full.
    """

    def __init__(self, dataset: Dataset | NamedRows):
        self.dataset = dataset
        self.pairs: dict[int, Row] = {}
        self.numbers = list(range(len(dataset)))

    @property
    def column_names(self) -> list[str]:
        """The columns of a pair."""
        return [name for name in COLLATED_COLUMNS if name in {*self.dataset.column_names, "chosen", "rejected"}]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place >= len(self):  # ends a loop over the rows
            raise IndexError(place)
        number = self.numbers[place % len(self.numbers)]
        row: dict[str, Any] = self.dataset[number]
        if number in self.pairs:
            row = {name: value for name, value in row.items() if name not in PAIR_COLUMNS} | dict(self.pairs[number])
        return {name: value for name, value in row.items() if name in COLLATED_COLUMNS}

    def put(self, pairs: Mapping[int, Row], own: bool) -> None:
        """Takes new pairs by the numbers of their rows; `own`: whether the dataset's rows have pairs, too."""
        self.pairs.update(pairs)
        self.numbers = [number for number in range(len(self)) if own or number in self.pairs]
        if not self.numbers:
            raise ValueError(
                f"The pair source gave no pair for any of {len(self)} rows, and the rows have none of their own. "
                "Check why it decides nothing, or start with a column `rejected`."
            )


class PairSourceCallback(TrainerCallback):
    """Replaces the pairs of the training rows by those that a source makes with the current policy.

    Between refreshes the trainer sees ordinary rows, so it also works with plain `trl.DPOTrainer`, on rows with
    images. Each process makes a share of the pairs, and all of them see the same ones. A row without a decision keeps
    the pair it had; one that never had a pair is replaced by another row. Data loaders fetch one batch ahead, so with
    `every_steps` the first batch after a refresh still has the pairs from before it.

    Logged: `pairs/undecided`, the share of rows without a decision, and the mean of each number that the source
    reports in a column `pair_*`.

    Args:
        source: Makes the pairs. Its `round` is the global step.
        trainer: Whose training rows are refreshed; add the callback to it.
        every_steps: Refresh before the first step and after every `every_steps` steps; None: at the beginning of each
            epoch.
        batch_size: Rows that the source gets at once.
        vllm: Where vLLM draws the samples of the source, if its `use_vllm` is on; it gets the policy's weights at each
            refresh.

    Raises:
        TypeError, ValueError: The trainer, its rows or its data loader cannot be refreshed, or vLLM has no effect.
        ImportError: vLLM is asked for, and not installed.

    Example:
        >>> trainer = trl.DPOTrainer("llava-hf/llava-1.5-7b-hf", train_dataset=rows)
        >>> trainer.add_callback(PairSourceCallback(BDHS(), trainer, every_steps=200))
    """

    def __init__(
        self,
        source: PairSource,
        trainer: trl.DPOTrainer,
        *,
        every_steps: int | None = None,
        batch_size: int = PAIR_BATCH_SIZE,
        vllm: VLLMOptions | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; a source gets 1 row or more at once.")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"`every_steps` is {every_steps}; use 1 or more, or None for each epoch.")
        if vllm is not None:
            check_vllm(vllm, source)
        dataset = _refreshable_rows(trainer, every_steps)
        assert isinstance(trainer.model, Model)  # as TRL takes them
        refuse_virtual_tokens(trainer.model)
        rows = named_rows(dataset, "train") if isinstance(dataset, Dataset) else dataset
        assert isinstance(rows, NamedRows)  # no stream
        self.rows = rows
        check_rows(self.rows.selected(), "ppo", name="train")
        self.source, self.trainer, self.every_steps = source, trainer, every_steps
        self.batch_size = batch_size
        self.extra = extra_replies(self.rows.selected())
        self.has_own = {"chosen", "rejected"} <= set(dataset.column_names)
        self.engine = VLLMReplies(trainer, vllm) if vllm is not None and vllm.use_vllm else None
        self.refreshed = RefreshedRows(dataset)
        # `Trainer` takes any dataset with rows by number; TRL's own says `datasets.Dataset`.
        trainer.train_dataset = self.refreshed  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Makes the first pairs, unless the first epoch does."""
        if self.every_steps is not None:
            self._refresh(state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Makes the pairs of an epoch."""
        if self.every_steps is None:
            self._refresh(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Makes new pairs every `every_steps` steps."""
        step = state.global_step
        if self.every_steps is not None and step % self.every_steps == 0 and step < state.max_steps:
            self._refresh(step)

    def _refresh(self, round: int) -> None:
        start, accelerator = time.perf_counter(), self.trainer.accelerator
        own_numbers = range(accelerator.process_index, len(self.rows), accelerator.num_processes)
        own_rows = [self.rows[number] for number in own_numbers]
        with sampling_policy(self.trainer, self.engine) as policy:
            pairs = made_pairs(self.source, own_rows, policy, round, self.batch_size)
        made = list(zip(own_numbers, map(self._trimmed, own_numbers, pairs), strict=True))
        decided = {number: pair for number, pair in gather_object(made) if pair is not None}
        statistics = total_statistics([pair_statistics(list(decided.values()))])
        pairs = {n: {name: pair[name] for name in PAIR_COLUMNS if name in pair} for n, pair in decided.items()}
        self.refreshed.put(pairs, self.has_own)
        undecided = 1 - len(decided) / len(self.rows)
        for name, value in {"pairs/undecided": undecided, **statistics}.items():
            self.trainer._metrics["train"][name].append(value)
        seconds = time.perf_counter() - start
        logger.info("Made pairs for %d of %d rows in %.0f s.", len(decided), len(self.rows), seconds)

    def _trimmed(self, number: int, pair: Row | None) -> Row | None:
        """The part of a pair that is sent to the other processes: the replies and the `pair_*` columns."""
        if pair is None:
            return None
        extra, is_ours = len(pair.get("rejected_extra") or ()), isinstance(self.trainer, DPOTrainer)
        expected = self.extra if is_ours else 0
        if extra != expected:
            remedy = (
                "Give the training rows a column `rejected_extra` with as many replies"
                if is_ours
                else "`trl.DPOTrainer` knows no further rejected replies; use `trl_vlm.DPOTrainer`"
            )
            raise ValueError(
                f"train row {number}: the pair source gave {extra} `rejected_extra`, and the trainer reads {expected}"
                f". {remedy}, or use a source that gives {expected}."
            )
        return {name: value for name, value in pair.items() if name in PAIR_COLUMNS or name.startswith("pair_")}


def _refreshable_rows(trainer: Any, every_steps: int | None) -> Dataset | NamedRows:
    """The training rows of a trainer; an error where they cannot be refreshed."""
    if not isinstance(trainer, trl.DPOTrainer):
        raise TypeError(
            f"`trainer` is a {type(trainer).__name__}. Pass the `DPOTrainer` (ours or TRL's) that the callback is "
            "added to."
        )
    args, dataset = trainer.args, trainer.train_dataset
    is_ours = isinstance(trainer, DPOTrainer)
    refused = {
        "has a `pair_source`, which makes new pairs at every step": is_ours and trainer._pair_maker is not None,
        "has a `reference_cache`, which holds the log-probabilities of the first pairs": (
            is_ours and trainer.args.reference_cache is not None
        ),
        "trains on a stream, whose rows cannot be written back": not isinstance(dataset, Dataset | NamedRows),
        "trains on rows without images, which TRL tokenized when it was made": not trainer._is_vision_dataset,
        "has workers that hold copies of the rows (`dataloader_num_workers`); use 0, or each epoch": (
            every_steps is not None and args.dataloader_num_workers > 0
        ),
        "has workers that hold copies of the rows (`dataloader_persistent_workers`); turn it off": (
            args.dataloader_num_workers > 0 and args.dataloader_persistent_workers
        ),
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"The pairs of this trainer cannot be refreshed: it {reason}.")
    assert isinstance(dataset, Dataset | NamedRows)
    return dataset
