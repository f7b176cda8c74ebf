import pytest
import torch
from transformers import AutoConfig, GenerationMixin

from tests.families import FAMILIES, batch, build, image, saved


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_generates_from_rows_with_one_two_and_no_images(family):
    model, processor = build(family)
    assert isinstance(model, GenerationMixin)
    assert sum(weight.numel() for weight in model.parameters()) < 300_000
    rows = batch(processor, [1, 2, 0], padding_side="left")
    replies = model.generate(**rows, max_new_tokens=2, do_sample=False)
    assert replies.shape[1] <= rows["input_ids"].shape[1] + 2
    assert torch.equal(replies[:, : rows["input_ids"].shape[1]], rows["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_image_matters_where_weights_are_sharp(family):
    model, processor = build(family, sharp=8.0)
    first, second = (model(**batch(processor, [1], seed=seed)).logits[:, -1] for seed in (0, 1))
    assert (first - second).abs().max() > 1e-3


def test_models_and_images_follow_their_seeds():
    weights = [build("llava", seed)[0].lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert image(0).tobytes() == image(0).tobytes() != image(1).tobytes()


def test_a_saved_family_is_an_ordinary_checkpoint():
    assert AutoConfig.from_pretrained(saved("llava")).architectures == ["LlavaForConditionalGeneration"]
    assert saved("llava") is saved("llava")
