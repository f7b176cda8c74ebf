import pytest
import torch
from transformers import AutoModelForImageTextToText

from trl_vlm.testbed.datasets import user
from trl_vlm.testbed.model import build_model
from trl_vlm.testbed.processor import IMAGE_TOKENS, encode_texts
from trl_vlm.testbed.world import REQUEST


@pytest.fixture
def batch(world, processor):
    images = [picture.image for picture in world.pictures(2, seed=0)]
    ids = encode_texts(processor, [[user(REQUEST)]] * 2).input_ids
    return {"input_ids": ids, **processor.image_processor(images, return_tensors="pt")}


def test_the_model_has_two_thirds_of_a_million_parameters_and_one_feature_per_cell(model, batch):
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(0.64e6, rel=0.01)
    features = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
    assert torch.stack(list(features)).shape == (2, IMAGE_TOKENS, 128)


def test_attention_begins_with_a_liking_for_equal_tokens(model):
    for layer in model.model.language_model.layers:
        assert torch.equal(layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight)
        assert layer.self_attn.k_proj.weight is not layer.self_attn.q_proj.weight


def test_one_seed_gives_one_model_and_leaves_the_global_generator_alone(processor, batch):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build_model(processor, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    logits = [model(**batch).logits for model in (first, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_the_picture_changes_what_is_said(model, batch):
    logits = model(**batch).logits
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-3


def test_a_saved_model_loads_through_auto_model_with_its_special_tokens(model, processor, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert loaded.generation_config.pad_token_id == processor.tokenizer.pad_token_id
