"""Rollouts are padded on the left, whatever the user's processor does."""

import pytest
import torch

import trl_vlm
from tests import families
from tests.trainers.ppo.helpers import count_letters, rollout, rows
from trl_vlm.models.image_tokens import image_token_mask
from trl_vlm.models.processors import load_processor

TYPES = {"qwen2_5_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}


def make(method, folder, family, processor):
    model = families.saved(family)
    args = getattr(trl_vlm, f"{method}Config")(
        str(folder),
        per_device_train_batch_size=4,
        max_completion_length=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_generations=2,
    )
    return getattr(trl_vlm, f"{method}Trainer")(
        str(model), reward_funcs=count_letters, args=args, train_dataset=rows([1, 2]), processing_class=processor
    )


@pytest.mark.parametrize("family", TYPES)
@pytest.mark.parametrize("method", ["GRPO", "RLOO", "PPO"])
def test_a_processor_that_pads_on_the_right_is_set_to_the_left(method, family, tmp_path, caplog):
    processor = load_processor(families.saved(family), padding_side="right")
    trainer = make(method, tmp_path, family, processor)
    assert "The processor pads on the right, and rollouts are padded on the left" in caplog.text
    assert trainer.processing_class.tokenizer.padding_side == "left"
    batch = rollout(trainer, [0, 0, 1, 1])
    assert not batch["prompt_mask"].all()
    types = batch[TYPES[family]][:, : batch["prompt_ids"].size(1)]
    is_image = image_token_mask(batch["prompt_ids"], trainer.model.config)
    assert torch.equal(types == 1, is_image) and is_image.any()


@pytest.mark.parametrize("method", ["GRPO", "RLOO", "PPO"])
def test_a_processor_that_pads_on_the_left_is_not_spoken_of(method, tmp_path, caplog):
    make(method, tmp_path, "llava", load_processor(families.saved("llava"), padding_side="left"))
    assert "The processor pads" not in caplog.text
