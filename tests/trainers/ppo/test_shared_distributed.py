"""Four roles on one base give the same ten steps on one process, under DDP, ZeRO-2, ZeRO-3 and FSDP2."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.distributed import launch
from tests.families import saved
from tests.lora_models import reward_adapter
from tests.trainers.ppo.shared_distributed_main import main

SCRIPT = "tests/trainers/ppo/shared_distributed_main.py"
IMAGES = [1, 2, 1, 1]
CHECKPOINTING = {"gradient_checkpointing": True}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    model = str(saved("llava", sharp=3.0))
    return {"model": model, "reward_model": reward_adapter(model, tmp_path_factory.mktemp("reward")), "images": IMAGES}


@pytest.fixture(scope="module")
def single(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    _, report = main(folder, {"use_cpu": True, "bf16": False}, batch=4, options={}, **models)
    return report, torch.load(folder / "weights.pt")


@pytest.mark.parametrize(
    "kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("zero2", "zero3", "fsdp2"))]
)
def test_ten_steps_on_two_processes_are_those_of_one(kind, models, single, tmp_path):
    expected, weights = single
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, batch=2, options=CHECKPOINTING, **models)
    for name, values in expected.items():
        for one, two in zip(values, report[name], strict=True):
            assert (one is None and two is None) or two == pytest.approx(one, rel=1e-5, abs=1e-5), name
    assert expected["ppo/value_mean"][8] != 0 and abs(expected["ppo/kl"][8]) > 1e-4
    found = torch.load(tmp_path / "weights.pt")
    for name, weight in found.items():
        assert_close(weight, weights[name], rtol=0, atol=1e-5, msg=name)
    # ZeRO-3 gathers what trains.
    assert {"value_model", "default"} <= {part for name in found for part in name.split(".")}
    policy = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    for name, weight in policy.items():
        assert_close(weight, weights[name.replace(".weight", ".default.weight")], rtol=0, atol=1e-5, msg=name)
    critic = load_file(tmp_path / "saved" / "value_model" / "adapter_model.safetensors")
    assert critic.keys() > policy.keys()
    reward = load_file(tmp_path / "saved" / "reward_model" / "adapter_model.safetensors")
    original = load_file(f"{models['reward_model']}/adapter_model.safetensors")
    assert reward.keys() == original.keys() and all(torch.equal(reward[name], original[name]) for name in reward)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_a_sharded_run_resumes_to_the_same_weights(kind, models, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    options |= {"optim": "adamw_torch", "learning_rate": 5e-3}  # FSDP2 cannot load an optimizer without a state
    launch(SCRIPT, kind, processes=2, folder=tmp_path / "whole", batch=2, options=options, **models)
    checkpoint = str(tmp_path / "whole" / "out" / "checkpoint-4")
    launch(
        *(SCRIPT, kind),
        processes=2,
        folder=tmp_path / "rest",
        batch=2,
        options=options,
        resume=checkpoint,
        **models,
    )
    whole, rest = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "rest"))
    assert whole.keys() == rest.keys()
    for name, weight in whole.items():
        assert torch.equal(rest[name], weight), name
