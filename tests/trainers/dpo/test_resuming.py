"""A DPO run that was killed anywhere, in any epoch and inside an accumulation, ends as if it had not been."""

import random

import pytest
import torch

from tests.trainers.dpo.helpers import lora, make, rows
from tests.trainers.dpo.sources import SOURCES
from tests.trainers.dpo.test_pair_sources import instructions
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.models import last_complete_checkpoint

ACCUMULATION = 2
IMAGES = (1, 2, 0, 1, 1, 0)
MICRO_BATCHES = 3 * len(IMAGES)  # three epochs, one row each


class Killed(Exception):
    """Stands for a kill: nothing behind it is run."""


class Watched(DPOTrainer):
    """Writes down the tokens of each micro-batch, prompts and replies, and dies at one of them."""

    seen: list[tuple[int, list]]
    dies_at: int | None = None

    def train(self, resume_from_checkpoint=None):
        checkpoint = resume_from_checkpoint
        step = 0 if checkpoint is None else int(str(checkpoint).rpartition("-")[2])
        self._micro_batch = step * ACCUMULATION
        return super().train(checkpoint)

    def training_step(self, *args, **kwargs):
        if self._micro_batch == self.dies_at:
            raise Killed
        self._micro_batch += 1
        return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, inputs):
        batch = super()._prepare_inputs(inputs)
        self.seen.append((self._micro_batch, batch["input_ids"].tolist()))
        return batch


def full():
    return {"data": rows(IMAGES)}


def with_lora():
    return {"data": rows(IMAGES), "peft_config": lora()}


def with_source():
    """Both candidates are sampled, with draws of their own in each epoch."""
    return {"data": instructions(IMAGES), "pair_source": SOURCES["judged"](), "peft_config": lora()}


def trainer_of(options, folder, dies_at=None):
    trainer = make(
        Watched,
        DPOConfig,
        folder,
        max_steps=-1,
        num_train_epochs=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ACCUMULATION,
        save_strategy="steps",
        save_steps=2,
        **options(),
    )
    trainer.seen, trainer.dies_at = [], dies_at
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("options", [full, with_lora, with_source], ids=["full", "lora", "pair source"])
def test_a_run_killed_at_random_moments_of_three_epochs_sees_the_same_rows_and_ends_with_the_same_weights(
    options, tmp_path
):
    whole = trainer_of(options, tmp_path / "whole")
    whole.train()
    expected = dict(whole.seen)
    assert len(expected) == MICRO_BATCHES and whole.state.global_step == MICRO_BATCHES // ACCUMULATION
    assert [expected[number] for number in range(1, 7)] != [expected[number] for number in range(7, 13)]
    moments = sorted(random.Random(0).sample(range(1, MICRO_BATCHES), 10))
    assert any(moment % ACCUMULATION for moment in moments)  # inside an accumulation too
    for moment in [*moments, None]:
        run = trainer_of(options, tmp_path / "killed", dies_at=moment)
        checkpoint = last_complete_checkpoint(tmp_path / "killed")
        if moment is None:
            run.train(checkpoint)
        else:
            with pytest.raises(Killed):
                run.train(checkpoint)
        for number, ids in run.seen:
            assert ids == expected[number], f"killed at {moment}, micro-batch {number}"
    assert run.state.global_step == whole.state.global_step
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
