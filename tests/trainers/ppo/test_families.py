"""PPO runs on every family: with LoRA and in full, on rows with no image, one, or several of several sizes."""

import math

import pytest

from tests import families
from tests.trainers.ppo.helpers import count_letters, lora, rows, settings
from trl_vlm import PPOTrainer

# Their critic is made from the policy, too: a mixture of experts, and a family whose experts can be chosen.
MORE_FAMILIES = ("qwen3_vl_moe", "gemma4")


def trained(family, images, folder, *, adapter=None, **options):
    trainer = PPOTrainer(
        str(families.saved(family, sharp=3.0)),
        reward_funcs=count_letters,
        args=settings(folder, max_completion_length=3, **options),
        train_dataset=rows(images),
        peft_config=adapter,
    )
    trainer.train()
    return trainer.state.log_history[:-1]


@pytest.mark.parametrize("make_adapter", [lambda: None, lora], ids=["full", "lora"])
@pytest.mark.parametrize("family", [*families.FAMILIES, *MORE_FAMILIES])
def test_every_family_starts_at_ratio_one_with_no_kl_and_learns_values(family, make_adapter, tmp_path):
    several = 1 if family == "paligemma" else 2  # its prompts put one image before the text
    first, second = trained(family, [several, 1], tmp_path, adapter=make_adapter())
    # One mini-batch and one epoch: the policy of the update is the policy of the rollout.
    assert first["ppo/kl"] == pytest.approx(0, abs=1e-4)
    assert first["clip_ratio/region_mean"] == second["clip_ratio/region_mean"] == 0
    # With a zero head the first value loss is half the mean squared return, and the first values are 0.
    assert first["ppo/value_mean"] == 0
    assert first["ppo/value_loss"] > 0.5 * first["ppo/return_mean"] ** 2 * 0.99
    assert second["ppo/value_mean"] != 0
    assert math.isfinite(second["loss"]) and second["grad_norm"] > 0


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_trains_on_rows_without_images_among_others(family, tmp_path):
    logs = trained(family, [0, 1], tmp_path, per_device_train_batch_size=1, num_mini_batches=2)
    assert all(math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in logs)
