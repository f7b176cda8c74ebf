"""PPO gives the same losses on one process, under DDP, ZeRO-2 and ZeRO-3."""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.distributed import launch
from tests.families import saved
from tests.trainers.ppo.distributed_main import main

SCRIPT = "tests/trainers/ppo/distributed_main.py"
# Under DDP a process may be without images.
IMAGES = {"ddp": [0, 0, 2, 1], "zero2": [1, 2, 1, 1], "zero3": [1, 2, 1, 1]}


@pytest.fixture(scope="module")
def model():
    return str(saved("llava", sharp=6.0))


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    @cache
    def run(images):
        folder = tmp_path_factory.mktemp("single")
        trainer, report = main(folder, {}, model=model, batch=4, images=list(images))
        assert trainer.accelerator.num_processes == 1
        return folder, report

    return run


@pytest.mark.distributed
@pytest.mark.parametrize("kind", IMAGES)
def test_two_processes_give_the_losses_metrics_and_weights_of_one(kind, single, model, tmp_path):
    folder, expected = single(tuple(IMAGES[kind]))
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, model=model, batch=2, images=IMAGES[kind])
    # Sums are taken in another order; nothing else differs.
    for name, values in expected.items():
        assert_close(report[name], values, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert expected["ppo/kl"][0] == pytest.approx(0, abs=1e-4) and abs(expected["ppo/kl"][2]) > 1e-3
    assert expected["ppo/value_mean"][2] != 0
    for file in ("model.safetensors", "value_model.safetensors"):
        weights, alone = load_file(tmp_path / "saved" / file), load_file(folder / "saved" / file)
        assert weights.keys() == alone.keys()
        for name, tensor in alone.items():
            # Adam divides by the size of the gradient: a weight with a tiny one may step either way.
            share = ((weights[name] - tensor).abs() > 1e-3).float().mean()
            assert share < 0.02, (name, torch.dist(weights[name], tensor))
