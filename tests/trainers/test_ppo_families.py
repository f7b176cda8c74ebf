"""PPO runs on every family: with LoRA and in full, on rows with images of several sizes."""

import math

import families
import pytest
from datasets import Dataset
from peft import LoraConfig

from trl_vlm import PPOConfig, PPOTrainer


def lora():
    return LoraConfig(r=4, target_modules="all-linear", exclude_modules="lm_head")


def count_letters(completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]


def rows(family, count=8):
    several = 1 if family == "paligemma" else 2  # its prompts put one image before the text
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "What is in the image?"}],
                "images": [families.image(i + 100 * j, 40 + 10 * j, 30) for j in range(1 + i % several)],
                "facts": ["a dog"],
            }
            for i in range(count)
        ]
    )


def settings(folder, **options):
    return PPOConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_completion_length": 5,
            "max_steps": 2,
            "num_ppo_epochs": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            **options,
        }
    )


@pytest.mark.parametrize("make_adapter", [lambda: None, lora], ids=["full", "lora"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_starts_at_ratio_one_with_no_kl_and_learns_values(family, make_adapter, tmp_path):
    trainer = PPOTrainer(
        str(families.saved(family, sharp=3.0)),
        reward_funcs=count_letters,
        args=settings(tmp_path),
        train_dataset=rows(family),
        peft_config=make_adapter(),
    )
    trainer.train()
    first, second = trainer.state.log_history[:2]
    # One mini-batch and one epoch: the policy of the update is the policy of the rollout.
    assert first["ppo/kl"] == pytest.approx(0, abs=1e-4)
    assert first["clip_ratio/region_mean"] == second["clip_ratio/region_mean"] == 0
    # With a zero head the first value loss is half the mean squared return, and the first values are 0.
    assert first["ppo/value_mean"] == 0
    assert first["ppo/value_loss"] > 0.5 * first["ppo/return_mean"] ** 2 * 0.99
    assert second["ppo/value_mean"] != 0
    assert math.isfinite(second["loss"]) and second["grad_norm"] > 0
