"""What the trainers will make of a model: a line for each thing, and models of which a line is wrong."""

import pytest
from peft import LoraConfig, get_peft_model

from tests.families import FAMILIES, TEMPLATES, build
from trl_vlm.doctor.model import describe
from trl_vlm.doctor.subject import Subject


def lines(model, processor):
    return {finding.name: finding for finding in describe(Subject(model, processor))}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_wrong_with_a_model_of_the_tests(family):
    model, processor = build(family)
    model.generation_config.eos_token_id = model.generation_config.eos_token_id or processor.tokenizer.eos_token_id
    found = lines(model, processor)
    assert {finding.verdict for finding in found.values()} <= {"ok", "note"}, "\n".join(map(str, found.values()))
    assert found["family"].verdict == "ok" and found["family"].text.startswith(family)
    assert repr(TEMPLATES[family].end) in found["end of a reply"].text
    assert "float32" in found["precision"].text and "vision tower" in found["parts"].text
    assert found["LoRA preset language-model"].text.startswith("14 layers")
    assert found["shared prompts"].text == "on"


def test_a_reply_that_sampling_does_not_end_is_reported():
    model, processor = build("qwen2_5_vl")
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids("</s>")
    end = lines(model, processor)["end of a reply"]
    assert end.verdict == "differs"
    assert "'<|im_end|>', from the chat template, and sampling stops at '</s>'" in end.text


def test_a_processor_with_another_image_token_is_reported():
    model, processor = build("llava")
    model.config.image_token_id = 5
    tokens = lines(model, processor)["image tokens"]
    assert tokens.verdict == "differs" and "the processor's '<image>'" in tokens.text


def test_sharing_that_is_off_has_its_reason():
    model, processor = build("llava")
    model.config.get_text_config()._attn_implementation = "flex_attention"
    found = lines(model, processor)
    assert found["attention"].text.startswith("flex_attention")
    assert found["shared prompts"].text.startswith("off: ")


def test_image_features_are_kept_unless_something_stands_on_the_tower():
    model, processor = build("llava")
    assert lines(model, processor)["image features"].text.startswith("encoded once for all passes")
    assert all(parameter.requires_grad for parameter in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert "an adapter stands on its vision tower" in lines(adapted, processor)["image features"].text


def test_a_tower_that_is_not_found_by_its_name_is_reported(monkeypatch):
    monkeypatch.setattr("trl_vlm.models.parts.TOWERS", frozenset({"eyes"}))
    parts = lines(*build("llava"))["parts"]
    assert parts.verdict == "differs" and "no vision tower is found by its name" in parts.text


def test_a_model_that_names_no_layers_cannot_be_wrapped(monkeypatch):
    model, processor = build("llava")
    model._no_split_modules = None
    assert lines(model, processor)["FSDP wraps"].verdict == "not possible"
