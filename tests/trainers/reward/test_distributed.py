"""Reward training gives the same losses on one process, under DDP and under ZeRO-2."""

import pytest
from torch.testing import assert_close

from tests.distributed import launch
from tests.families import saved
from tests.trainers.reward.distributed_main import main

SCRIPT = "tests/trainers/reward/distributed_main.py"
IMAGES = [1, 2, 1, 1, 2, 1, 1, 1]


@pytest.fixture(scope="module")
def model():
    return str(saved("llava", sharp=8))


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    trainer, report = main(folder, {"use_cpu": True, "bf16": False}, model=model, batch=4, images=IMAGES)
    assert trainer.accelerator.num_processes == 1
    return report


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_two_processes_give_the_losses_and_metrics_of_one(kind, single, model, tmp_path):
    mixed = kind == "ddp"
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, model=model, batch=2, images=IMAGES, mixed=mixed)
    # Sums are taken in another order; nothing else differs. Five held-out pairs do not divide by two processes.
    assert_close(report["losses"], single["losses"], rtol=1e-4, atol=1e-5)
    assert_close(report["margins"], single["margins"], rtol=1e-3, atol=1e-4)
    assert_close(report["evaluation"], single["evaluation"], rtol=1e-3, atol=1e-4)
    assert abs(single["losses"][-1] - single["losses"][0]) > 0.01  # it did train
    # Under DDP a process may have a batch without images while the other has one.
    assert report.get("mixed_batches_train", False) == mixed
