"""The model card says what was done, on which rows, and how the result is loaded."""

import re

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from tests.trainers.ppo.helpers import rows as prompt_rows
from tests.trainers.test_options import make
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.judges.judge import ScriptedJudge
from trl_vlm.pairs import BDHS, POVID, DatasetPairs, Judged, MixedPairs


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


def test_the_card_of_the_image_side_names_its_paper_and_its_weights(tmp_path):
    text = card_of("DPO", tmp_path, image_preset="opa").text
    assert "2501.09695" in text and "weight 0.2" in text and "anchor of weight 1.0" in text
    assert "corrupted images (`mask`)" in text


def test_the_card_of_dense_dpo_names_its_paper_and_its_weights(tmp_path):
    text = card_of("DPO", tmp_path, dense_preset="paper").text
    assert "2312.00849" in text and "weigh 5.0 times" in text and "| `dense_gamma` | 5.0 |" in text


def test_the_card_of_a_reward_model_shows_the_words_of_its_judge_turn(tmp_path):
    template = JudgeTemplate(request="Judge it.{facts}", opening="It is")
    text = card_of("Reward", tmp_path, trainer={"judge_template": template}).text
    assert "Judge it.{facts}" in text and "It is" in text


@pytest.mark.parametrize(
    "source, said",
    [
        (BDHS(), ["`BDHS`", "2407.02477"]),
        (
            Judged(ScriptedJudge(lambda comparison: 0)),
            ["`Judged`", "2407.02477", "A `ScriptedJudge` chose between replies."],
        ),
        (MixedPairs(DatasetPairs(), POVID()), ["`MixedPairs`, `DatasetPairs`, `POVID`", "2402.11411"]),
    ],
    ids=["bdhs", "judged", "mixed"],
)
def test_the_card_of_a_run_with_a_source_names_how_the_pairs_were_made_and_its_paper(source, said, tmp_path):
    rows = prompt_rows([1, 1]).map(lambda row: {"completion": [{"role": "assistant", "content": "A cat."}]})
    text = card_of("DPO", tmp_path, trainer={"pair_source": source, "train_dataset": rows}).text
    for words in (*said, "2305.18290", "The pairs were made during training by"):
        assert words in text, words
    assert text.count("2305.18290") == 1
