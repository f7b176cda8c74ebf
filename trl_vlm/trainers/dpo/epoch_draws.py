"""Random numbers that collators draw for rows: others in every epoch, and the same after a resume."""

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_vlm.pairs.draws import Draws


class EpochDraws(TrainerCallback):
    """The draws for a row, which depend on the seed of the run, the epoch and the row alone.

    They could not come from torch's global generator: batches are made ahead, so a resumed run would make its first
    ones before the generator's state is restored, and each worker of a data loader has a generator of its own.

    Args:
        seed: Of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed
        # Shared, for a data loader may copy its collator to workers that live through several epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._next = 0

    def __call__(self, row: str) -> Draws:
        """The draws for the row of this name in the current epoch, counted from 0."""
        return Draws(self.seed, int(self._epoch), row)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Goes back to the beginning, or to where a resumed run goes on."""
        self._next = int(state.epoch)
        self._epoch.fill_(self._next)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Counts: `state.epoch` stays below 1 where the length of a stream is unknown."""
        self._epoch.fill_(self._next)
        self._next += 1
