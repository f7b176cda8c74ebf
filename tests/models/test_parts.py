from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.families import FAMILIES, batch, build, saved
from trl_vlm.models.parts import freeze_vision_tower, part_of, trainable_parameter_table
from trl_vlm.models.reward_model import load_reward_model


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "vision tower"),
        ("model.vision_tower.head.attention.in_proj_weight", "vision tower"),  # Gemma3's pooling head
        ("model.visual.blocks.0.attn.qkv.weight", "vision tower"),
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.visual.deepstack_merger_list.0.linear_fc1.weight", "projector"),
        ("model.connector.modality_projection.proj.weight", "projector"),
        ("model.image_newline", "projector"),
        ("model.multi_modal_projector.mm_input_projection_weight", "projector"),
        ("model.language_model.layers.0.mlp.gate_proj.weight", "language model"),
        ("model.text_model.embed_tokens.weight", "language model"),
        ("lm_head.weight", "head"),
        ("score.weight", "head"),
        ("base_model.model.score.modules_to_save.default.weight", "head"),
        ("base_model.model.model.visual.merger.mlp.2.lora_A.default.weight", "projector"),
        ("critic.base_model.model.model.vision_tower.encoder.layers.1.mlp.fc1.lora_B.default.weight", "vision tower"),
        ("module.value_model.model.language_model.norm.weight", "language model"),
    ],
)
def test_a_part_is_told_by_name_whatever_wraps_it(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_what_the_gradient_of_the_pixels_passes(family):
    """Without images neither vision tower nor projector has a gradient; with images both have."""
    model, processor = build(family, sharp=4.0)
    for images, expected in (([0, 0], {"language model"}), ([1, 1], {"vision tower", "projector", "language model"})):
        model.zero_grad()
        model(**batch(processor, images)).logits.square().mean().backward()
        reached = {
            part_of(name)
            for name, weight in model.named_parameters()
            if weight.grad is not None and weight.grad.abs().sum() > 0
        }
        assert reached - {"head"} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_freezing_the_vision_tower_leaves_the_projector(family):
    model, _ = build(family)
    frozen = freeze_vision_tower(model)
    by_part = defaultdict(set)
    for name, weight in model.named_parameters():
        by_part[part_of(name)].add(weight.requires_grad)
    assert by_part.pop("vision tower") == {False}
    assert set(by_part) >= {"projector", "language model"}
    assert all(trains == {True} for trains in by_part.values())
    assert frozen == sum(weight.numel() for weight in model.parameters() if not weight.requires_grad) > 0


def test_freezing_reaches_adapters_inside_the_vision_tower():
    model = get_peft_model(
        build("llava")[0], LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    )
    freeze_vision_tower(model)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert {part_of(name) for name in trained} == {"projector", "language model", "head"}


def test_a_model_without_a_known_vision_tower_is_refused():
    with pytest.raises(ValueError, match=r"its children are: 0; known names: .*vision_tower.*requires_grad_"):
        freeze_vision_tower(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_the_table_counts_each_part():
    model, _ = build("llava")
    freeze_vision_tower(model)
    lines = [line.rsplit(maxsplit=3) for line in trainable_parameter_table(model).splitlines()]
    counts = {name: (int(some.replace(",", "")), int(every.replace(",", ""))) for name, some, every, _ in lines[1:]}
    assert counts["vision tower"] == (0, sum(weight.numel() for weight in model.model.vision_tower.parameters()))
    projector = sum(weight.numel() for weight in model.model.multi_modal_projector.parameters())
    assert counts["projector"] == (projector, projector)
    assert counts["head"] == (model.lm_head.weight.numel(),) * 2
    assert counts["total"][1] == sum(weight.numel() for weight in model.parameters())


def test_4bit_weights_count_as_what_they_stand_for():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    def total(model):
        return trainable_parameter_table(model).splitlines()[-1].split()[2]

    folder = saved("llava", width=64)
    packed = load_reward_model(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert any(weight.dtype == torch.uint8 for weight in packed.parameters())
    assert total(packed) == total(load_reward_model(folder))
