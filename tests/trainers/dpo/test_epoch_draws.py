"""Corrupted images of a run: others in every epoch, and a resumed run sees those of an uninterrupted one."""

import pytest
import torch
from transformers import TrainerState

from tests.trainers.dpo.helpers import lora, make, rows
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.trainers.dpo.epoch_draws import EpochDraws

SAVED = 5  # of six steps, in the middle of the last of two epochs
RUNS = {
    "mask": {"image_weight": 1.0, "image_corruption": "mask", "image_mask_ratio": 0.5},
    "noise": {"image_weight": 1.0, "image_corruption": "noise", "anchor_weight": 0.5},
    "noise in a worker": {"image_weight": 1.0, "image_corruption": "noise", "dataloader_num_workers": 1},
    "crop, lora with dropout": {"image_weight": 1.0, "image_corruption": "crop", "adapter": True},
    "other": {"image_weight": 1.0, "image_corruption": "other"},
    "povid": {"povid_loss": "shared"},
}


def run(folder, resume=None, adapter=False, **options):
    """The weights after two epochs of three steps."""
    if adapter:
        config = lora()
        config.lora_dropout = 0.3
        options |= {"peft_config": config, "disable_dropout": False}
    saving = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": 6}
    trainer = make(DPOTrainer, DPOConfig, folder, data=rows((1, 1, 1, 1, 2, 1)), **saving, **options)
    trainer.train(resume)
    return trainer.model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(name, tmp_path):
    wanted = run(tmp_path / "whole", **RUNS[name])
    found = run(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{SAVED}"), **RUNS[name])
    for weight, value in wanted.items():
        assert torch.equal(found[weight], value), weight


def numbers(draws, state, begins):
    """A draw for a row in each of the epochs that a training begins."""
    draws.on_train_begin(None, state, None)
    found = []
    for _ in range(begins):
        draws.on_epoch_begin(None, state, None)
        found.append(draws("train row 3").seed_of("noise"))
    return found


def test_draws_depend_on_the_seed_the_epoch_and_the_row_alone():
    draws = EpochDraws(seed=7)
    whole = numbers(draws, TrainerState(epoch=0.0), 4)
    assert len(set(whole)) == 4
    assert numbers(draws, TrainerState(epoch=0.0), 4) == whole  # a second training
    assert numbers(EpochDraws(seed=7), TrainerState(epoch=2.5), 2) == whole[2:]  # resumed in the third epoch
    assert numbers(EpochDraws(seed=7), TrainerState(epoch=2.0), 2) == whole[2:]  # and at its beginning
    assert not set(numbers(EpochDraws(seed=8), TrainerState(epoch=0.0), 4)) & set(whole)
    assert draws("train row 4") != draws("train row 3")
