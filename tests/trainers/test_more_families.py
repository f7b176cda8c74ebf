"""Families beyond the ten: what plain TRL trains, our trainers train, or they say in a sentence why not."""

import math
from functools import partial

import pytest
from trl import DPOConfig as TRLDPOConfig
from trl import DPOTrainer as TRLDPOTrainer

from tests import families
from tests.more_families import MORE_FAMILIES
from tests.preference_rows import preference_rows
from tests.trainers.dpo import helpers as dpo
from tests.trainers.ppo import helpers as ppo
from tests.trainers.reward import helpers as reward
from trl_vlm import DPOConfig, DPOTrainer, PPOTrainer, RewardTrainer
from trl_vlm.models import image_tokens

# transformers refuses its own default for Gemma 2 inside another model.
EAGER = {"attn_implementation": "eager"}
WHOLE_PROMPTS = {"paligemma2"}  # all of a prompt sees all of it


def loading(family: str) -> dict:
    return {"model_init_kwargs": {"dtype": "float32", **(EAGER if family == "paligemma2" else {})}}


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_dpo_has_the_losses_of_trl_with_shared_prefixes_or_without(family, tmp_path, caplog):
    rows = dpo.rows((1, 0, 1, 1) if family in WHOLE_PROMPTS else (1, 2, 0, 1))
    options = {**loading(family), "max_steps": 3}
    theirs = dpo.losses(dpo.make(TRLDPOTrainer, TRLDPOConfig, tmp_path, family, rows, **options))
    ours = dpo.losses(dpo.make(DPOTrainer, DPOConfig, tmp_path, family, rows, **options))
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert ("layers of type linear_attention cannot keep the replies apart" in caplog.text) == (family == "qwen3_5")


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_reward_models_train(family, tmp_path):
    args = reward.config(tmp_path, learning_rate=5e-3, max_steps=2, **loading(family))
    trainer = RewardTrainer(str(families.saved(family, sharp=4)), args, train_dataset=preference_rows([1, 0, 1, 1]))
    first, second = reward.losses(reward.trained(trainer))
    assert math.isfinite(first) and second != first


@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize("make_adapter", [lambda: None, ppo.lora], ids=["full", "lora"])
def test_ppo_starts_at_ratio_one_with_no_kl_and_learns_values(family, make_adapter, tmp_path):
    trainer = PPOTrainer(
        str(families.saved(family, sharp=3.0)),
        reward_funcs=ppo.count_letters,
        args=ppo.settings(tmp_path, max_completion_length=3, **loading(family)),
        train_dataset=ppo.rows([0, 1] if family in WHOLE_PROMPTS else [2, 1]),
        peft_config=make_adapter(),
    )
    trainer.train()
    first, second = trainer.state.log_history[:-1]
    assert first["ppo/kl"] == pytest.approx(0, abs=1e-4)
    assert first["clip_ratio/region_mean"] == second["clip_ratio/region_mean"] == 0
    assert first["ppo/value_mean"] == 0 != second["ppo/value_mean"]
    assert math.isfinite(second["loss"]) and second["grad_norm"] > 0


def test_the_count_of_image_tokens_can_be_left_to_the_model(tmp_path, monkeypatch):
    """As where a processor's settings say something else than the model does."""

    def wrong(batch, images, processor):
        return [99] * len(images)

    monkeypatch.setattr(image_tokens, "features_per_row", wrong)
    rows, model = dpo.rows((1, 1)), str(families.saved("llava", sharp=4))

    def rewarding(**options):
        args = reward.config(tmp_path, max_steps=1, **options)
        return RewardTrainer(model, args, train_dataset=preference_rows([1, 1]))

    for make in (partial(dpo.make, DPOTrainer, DPOConfig, tmp_path, data=rows, max_steps=1), rewarding):
        with pytest.raises(ValueError, match="image placeholders for 1 image.s., which make 99 features"):
            make().train()
        make(check_image_tokens=False).train()
