"""The model card says what was done, on which rows, and how the result is loaded."""

import re

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from tests.trainers.test_options import make
from trl_vlm.data.facts import JudgeTemplate


def card_of(method, folder, **more):
    trainer = make(method, folder, **more)
    trainer.create_model_card(model_name="my-model")
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=True)


@pytest.mark.parametrize(
    "method, said",
    [
        ("DPO", ["Direct preference optimization", "AutoModelForImageTextToText", "`chosen`", "2305.18290"]),
        ("Reward", ["Bradley-Terry", "RewardModelReward", "needs trl_vlm to load", "## Judge template", "2309.14525"]),
        ("PPO", ["Proximal policy optimization", "`count_letters`", "`value_model.safetensors`", "1707.06347"]),
        ("SFT", ["Supervised fine-tuning on replies", "`completion`"]),
        ("GRPO", ["Group-relative policy optimization", "`count_letters`", "2402.03300"]),
        ("RLOO", ["REINFORCE leave-one-out", "`count_letters`"]),
    ],
)
def test_a_card_names_the_method_the_rows_and_the_way_to_load(method, said, tmp_path):
    card = card_of(method, tmp_path, freeze_vision_tower=True)
    assert {"trl", "trl-vlm"} <= set(card.data.tags)
    for words in [
        *said,
        "`prompt`",
        "`images`",
        "# my-model",
        "projector (in full)",
        "| `freeze_vision_tower` | True |",
    ]:
        assert words in card.text, words
    assert "vision tower (" not in card.text and "The capital of France" not in card.text
    assert not re.search(r"\bNone\b|/tmp/", card.text)


def test_the_card_of_an_adapter_loads_its_base(tmp_path):
    card = card_of("DPO", tmp_path, trainer={"peft_config": LoraConfig(r=2, target_modules="language-model")})
    assert "/tmp/" not in card.text
    assert "PeftModel.from_pretrained(base" in card.text and "language model (adapter)" in card.text


def test_the_card_of_dense_dpo_names_its_paper_and_its_weights(tmp_path):
    text = card_of("DPO", tmp_path, dense_preset="paper").text
    assert "2312.00849" in text and "weigh 5.0 times" in text and "| `dense_gamma` | 5.0 |" in text


def test_the_card_of_a_reward_model_shows_the_words_of_its_judge_turn(tmp_path):
    template = JudgeTemplate(request="Judge it.{facts}", opening="It is")
    text = card_of("Reward", tmp_path, trainer={"judge_template": template}).text
    assert "Judge it.{facts}" in text and "It is" in text
