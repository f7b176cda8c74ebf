"""PPO gives the same losses on one process, under DDP, ZeRO-2 and ZeRO-3."""

from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.distributed import launch
from tests.families import load_processor, saved
from tests.trainers.ppo.distributed_main import REPORTED, main
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.reward_model import load_reward_model

SCRIPT = "tests/trainers/ppo/distributed_main.py"
# Under DDP a process may be without images.
IMAGES = {"ddp": [0, 0, 2, 1], "zero2": [1, 2, 1, 1], "zero3": [1, 2, 1, 1]}


@pytest.fixture(scope="module")
def model():
    return str(saved("llava", sharp=6.0))


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    @cache
    def run(images, each_token):
        folder = tmp_path_factory.mktemp("single")
        trainer, report = main(folder, {}, model=model, batch=4, images=list(images), each_token=each_token)
        assert trainer.accelerator.num_processes == 1
        return folder, report

    return run


@pytest.mark.distributed
@pytest.mark.parametrize("kind", IMAGES)
def test_two_processes_give_the_losses_metrics_and_weights_of_one(kind, single, model, tmp_path):
    each_token = kind != "ddp"  # there a reward for the whole reply
    folder, expected = single(tuple(IMAGES[kind]), each_token)
    options = {"images": IMAGES[kind], "each_token": each_token}
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, model=model, batch=2, **options)
    # Sums are taken in another order; nothing else differs.
    for name in REPORTED:
        same = {"rtol": 2e-3, "atol": 2e-4, "msg": lambda text, name=name: f"{name}: {text}"}
        assert_close(report[name], expected[name], **same)
    if kind == "zero3":  # for each of the three generations
        assert report["gathered"] == [{"policy": 1.0, "critic": 0.0}] * 3
    assert expected["ppo/kl"][0] == pytest.approx(0, abs=1e-4) and abs(expected["ppo/kl"][2]) > 1e-3
    assert expected["ppo/value_mean"][2] != 0
    for file in ("model.safetensors", "value_model.safetensors"):
        weights, alone = load_file(tmp_path / "saved" / file), load_file(folder / "saved" / file)
        assert weights.keys() == alone.keys()
        for name, tensor in alone.items():
            if "vision" in name and name.endswith("k_proj.bias"):
                continue  # a softmax ignores what all keys have in common: its gradient is rounding alone
            # Adam divides by the size of the gradient: a weight with a tiny one may step either way.
            share = ((weights[name] - tensor).abs() > 1e-3).float().mean()
            assert share < 0.02, (name, torch.dist(weights[name], tensor))


@pytest.mark.distributed
def test_zero3_in_bfloat16_trains_adapters_of_policy_and_critic(model, tmp_path):
    report = launch(
        *(SCRIPT, "zero3"),
        processes=2,
        folder=tmp_path,
        mixed_precision="bf16",
        model=model,
        batch=2,
        images=[1, 2, 1, 1],
        adapter=True,
    )
    assert report["ppo/value_mean"][0] == 0 and report["ppo/value_mean"][2] != 0


@pytest.mark.distributed
def test_fsdp2_with_a_reward_adapter_gives_the_losses_of_one_process(model, tmp_path):
    """The layers to wrap are found for the model, and a critic that only the first process has read is filled."""
    reward = tmp_path / "reward"
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    adapter = get_peft_model(load_reward_model(model), config)
    adapter.save_pretrained(reward)
    load_processor("llava").save_pretrained(reward)
    JudgeTemplate(request="Judge it.{facts}", opening="It is").save_pretrained(reward)
    more = {"model": model, "images": [1, 2, 1, 1], "reward_model": str(reward), "adapter": True}
    _, expected = main(tmp_path / "single", {"use_cpu": True, "bf16": False}, batch=4, **more)
    report = launch(SCRIPT, "fsdp2", processes=2, folder=tmp_path / "run", batch=2, **more)
    for name in ("loss", "ppo/score", "ppo/kl", "ppo/value_mean"):
        assert_close(report[name], expected[name], rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
