"""What trainers check of a model before they train it."""

import pytest
from transformers import AutoModelForImageTextToText

from tests import families
from tests.trainers.dpo import helpers as dpo
from tests.trainers.ppo import helpers as ppo
from trl_vlm import DPOConfig, DPOTrainer, PPOTrainer


def scaled(**settings):
    """A LLaVA whose text model's configuration names a scaling that LLaVA's own forward does not do."""
    folder = families.saved("llava", sharp=4)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    vars(model.config.get_text_config()).update(settings)
    return model


def preferring(folder, model):
    return dpo.make(DPOTrainer, DPOConfig, folder, model=model, ref_model=scaled(), max_steps=1)


def sampling(folder, model):
    return PPOTrainer(model, ppo.count_letters, ppo.settings(folder, temperature=0.7), ppo.rows([1, 1]))


@pytest.mark.parametrize("make", [preferring, sampling])
@pytest.mark.parametrize("setting", ["logit_scale", "final_logit_softcapping"])
def test_log_probabilities_that_are_not_the_models_own_are_refused(make, setting, tmp_path):
    with pytest.raises(RuntimeError, match=rf"log-probabilities of llava are not .* TRL reads .*{setting}': 0.25"):
        make(tmp_path, scaled(**{setting: 0.25}))
    assert make(tmp_path, scaled(**{setting: None})) is not None


@pytest.mark.parametrize("family", ["gemma4", "paligemma2"])
def test_a_model_that_caps_its_logits_as_trl_does_is_trained(family, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(families.saved(family, sharp=4), attn_implementation="eager")
    model.config.get_text_config().final_logit_softcapping = 2.0
    processor = families.load_processor(family)
    trainer = PPOTrainer(
        model, ppo.count_letters, ppo.settings(tmp_path), ppo.rows([1, 1]), processing_class=processor
    )
    assert trainer.temperature == 1.0
