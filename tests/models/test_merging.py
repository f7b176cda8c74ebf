"""An adapter merged into its base gives what the adapter gave, in a folder that needs nothing else."""

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from tests.families import batch, load_processor, saved
from tests.hub import ScriptedHub
from trl_vlm.cli.main import main
from trl_vlm.data import JudgeTemplate
from trl_vlm.models import load_reward_model
from trl_vlm.models.loading import load_generative_model
from trl_vlm.models.merging import merge_adapter

LORA = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def logits(model, processor):
    with torch.no_grad():
        return model.eval()(**batch(processor, [1, 0])).logits


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def policy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "adapter"
    model = get_peft_model(load_generative_model(saved(request.param)), LoraConfig(**LORA))
    model.peft_config["default"].base_model_name_or_path = str(saved(request.param))
    model.save_pretrained(folder)
    return request.param, folder


def test_a_merged_policy_is_an_ordinary_model_with_the_logits_of_the_adapter(policy, tmp_path):
    family, folder = policy
    (folder / "checkpoint-2").mkdir(exist_ok=True)
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "settings.json").write_text("{}")
    merged = merge_adapter(folder, tmp_path / "merged", dtype="float32")
    processor = load_processor(merged)
    found = AutoModelForImageTextToText.from_pretrained(merged, dtype="float32")
    torch.testing.assert_close(logits(found, processor), logits(load_generative_model(folder), processor))
    names = {file.name for file in merged.iterdir()}
    assert "config.json" in names
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "checkpoint-2", "training_args.bin"}
    assert "settings.json" not in names  # else it would pass for a finished run


def test_a_merged_reward_model_keeps_its_head_and_its_template(tmp_path):
    model = load_reward_model(saved("llava"))
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA))
    adapted.peft_config["default"].base_model_name_or_path = str(saved("llava"))
    adapted.base_model.model.score.modules_to_save.default.weight.data.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    JudgeTemplate(opening="Is it so?").save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    processor = load_processor(merged)
    before = logits(load_reward_model(tmp_path / "adapter", for_scoring=True), processor)
    torch.testing.assert_close(logits(load_reward_model(merged, for_scoring=True), processor), before)
    assert JudgeTemplate.from_pretrained(merged) == JudgeTemplate(opening="Is it so?")


def test_the_command_merges_in_bfloat16_and_refuses_what_it_cannot_do(policy, tmp_path, capsys):
    _, folder = policy
    assert main(["merge", str(folder), "--output", str(tmp_path / "merged")]) == 0
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert main(["merge", str(folder), "--output", str(tmp_path / "merged")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", str(saved("llava")), "--output", str(tmp_path / "other")]) == 1
    assert "there is nothing to merge" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_merged_model_is_uploaded_with_a_card_that_loads_it(policy, tmp_path, monkeypatch, capsys):
    family, folder = policy
    hub = ScriptedHub(tmp_path / "hub").install(monkeypatch)
    words = ["merge", str(folder), "--output", str(tmp_path / "merged"), "--push-to-hub", "me/merged", "--private"]
    assert main(words) == 0
    assert hub.repositories["me/merged"] == {"repo_type": "model", "private": True, "exist_ok": True}
    card = ModelCard.load(hub.folder("me/merged") / "README.md")
    assert card.data.tags == ["trl-vlm"] and 'AutoModelForImageTextToText.from_pretrained("me/merged")' in card.text
    assert str(tmp_path) not in card.text and "The adapter `adapter`, merged into" in card.text
    assert "https://hub.test/me/merged" in capsys.readouterr().err


def test_a_merge_that_fails_leaves_nothing_behind(policy, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("trl_vlm.models.merging.load_generative_processor", fail)
    with pytest.raises(OSError, match="disk full"):
        merge_adapter(policy[1], tmp_path / "merged")
    assert not list(tmp_path.iterdir())
