"""An image goes through a frozen vision tower once, whoever reads its features, and the features are the same."""

import copy
import functools
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from tests import families
from tests.encoded_images import vision_tower, watched
from trl_vlm.models import feature_cache
from trl_vlm.models.feature_cache import cache_image_features, stop_caching, why_not_cached
from trl_vlm.models.feature_store import Features, FeatureStore
from trl_vlm.models.image_calls import ImageCall
from trl_vlm.models.parts import part_of
from trl_vlm.models.reward_model import load_reward_model

GIB = 2.0**30
# Their towers multiply the patches of all images at once, and round otherwise for other numbers of patches.
ROUNDING = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}
FAMILIES = [*families.FAMILIES, "gemma4", "qwen3_vl_moe", "llava_onevision", "paligemma2"]
SHARP = 3.0


def frozen(family, **options):
    model, processor = families.build(family, **{"sharp": SHARP, **options})
    return model.requires_grad_(False), processor


def cached(family, limit=GIB, **options):
    model, processor = frozen(family, **options)
    store = FeatureStore(limit)
    cache_image_features(model, store)
    return model, processor, store


def several(family):
    """As many images as a row may have."""
    return 1 if family.startswith("paligemma") else 2


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def assert_the_same(family, found, expected):
    """To the last digit, or of some families within the rounding of one matrix product."""
    tolerance = 2e-6 if family in ROUNDING else 0
    assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_was_encoded_before_the_numbers_are_the_same_and_no_image_is_encoded_twice(family):
    plain, processor = frozen(family)
    model, _, store = cached(family)
    counts = ([several(family), 1], [several(family)], [1], [several(family), 1, 1], [several(family), 1])
    batches = [families.batch(processor, list(images)) for images in counts]
    with watched(plain) as before, watched(model) as now:
        for batch in batches:
            assert_the_same(family, logits(model, batch), logits(plain, batch))
        assert 0 < len(now) < len(before)
        # The first batch has all but the third row of the fourth, and the only row of the third.
        assert len(set(now.rows())) == len(now.rows()) or family.startswith("qwen")
        encoded = len(now)
        for batch in reversed(batches):
            assert_the_same(family, logits(model, batch), logits(plain, batch))
        assert len(now) == encoded
    assert 0 < store.size < 2**22


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_generates_from_the_same_features(family):
    plain, processor = frozen(family)
    model, _, _ = cached(family)
    batch = families.batch(processor, [several(family), 1], padding_side="left")
    expected = plain.generate(**batch, max_new_tokens=4, do_sample=False)
    with watched(model) as passes:
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), expected)
        once = len(passes)
        twice = model.generate(**batch, max_new_tokens=4, do_sample=False, num_return_sequences=1)
        assert torch.equal(twice, expected)
        logits(model, batch)
        assert len(passes) == once > 0
    several_replies = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    assert torch.equal(model.generate(**batch, **several_replies), plain.generate(**batch, **several_replies))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_depend_on_nothing_but_tower_and_projector(family):
    """On which the cache looks for weights that train, adapters and changes."""
    model, processor = frozen(family)
    batch = families.batch(processor, [several(family), 1])
    seen = []
    method = type(model.base_model).get_image_features

    def see(*args, **kwargs):
        seen.append(method(*args, **kwargs))
        return seen[-1]

    model.base_model.get_image_features = see.__get__(model.base_model)
    logits(model, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name) in ("language model", "head"):
                parameter.add_(torch.randn_like(parameter))
    logits(model, batch)
    for one, other in zip(*map(layers, seen), strict=True):
        assert torch.equal(one, other)


def layers(output):
    deep = [tensor for layer in getattr(output, "deepstack_features", None) or () for tensor in layer]
    return [*output.pooler_output, *deep]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_gradients_are_those_without_the_cache(family):
    found = []
    for cache in (False, True):
        model, processor = frozen(family)
        torch.manual_seed(0)
        targets = r".*(language_model|text_model).*(q_proj|v_proj)"
        policy = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).train()
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
        if cache:
            cache_image_features(policy.get_base_model(), FeatureStore(GIB))
        batch = families.batch(processor, [2, 1])
        for _ in range(2):
            policy(**batch).logits.square().mean().backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 4
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# What may be kept


def adapted(targets):
    def add(model):
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets)).get_base_model()

    return add


def with_dropout(model):
    vision_tower(model).encoder.layers[0].self_attn.dropout = 0.1
    return model


def training(name):
    def train(model):
        model.get_parameter(name).requires_grad_(True)
        return model

    return train


WHY_NOT = {
    "tower": (
        training("model.vision_tower.embeddings.class_embedding"),
        "or projector trains .*class_emb",
    ),
    "projector": (training("model.multi_modal_projector.linear_1.weight"), r"trains \(linear_1.weight\)"),
    "an adapter on the tower": (adapted(["q_proj"]), 'an adapter stands on its vision tower.*"language-model"'),
    "an adapter on the projector": (adapted(["linear_1"]), "an adapter stands on its vision tower or projector"),
    "dropout": (with_dropout, "has dropout"),
}


@pytest.mark.parametrize("case", WHY_NOT)
def test_what_is_not_the_same_each_time_is_refused_with_a_sentence(case):
    change, reason = WHY_NOT[case]
    model = change(frozen("llava")[0])
    with pytest.raises(
        ValueError, match=f"LlavaForConditionalGeneration must encode its images each time: .*{reason}"
    ):
        cache_image_features(model, FeatureStore(GIB))


@pytest.mark.parametrize("case", WHY_NOT)
def test_what_changes_later_is_encoded_each_time_from_then_on(case):
    model, processor, store = cached("llava")
    batch = families.batch(processor, [2])
    logits(model, batch)
    model = WHY_NOT[case][0](model)
    with watched(model) as passes:
        logits(model, batch)
        logits(model, batch)
    assert len(passes.pixels) == 2
    if case == "tower":
        model(**batch).logits.sum().backward()
        assert model.get_parameter("model.vision_tower.embeddings.class_embedding").grad.abs().max() > 0


def test_an_adapter_of_the_language_model_is_no_reason():
    assert why_not_cached(adapted(r".*language_model.*q_proj")(frozen("llava")[0])) is None


def test_a_family_that_no_test_knows_is_refused():
    assert "qwen3_5 is not among the families" in why_not_cached(frozen("qwen3_5")[0])


def test_a_model_that_reads_no_images_is_refused():
    assert "llama has no `get_image_features`" in why_not_cached(frozen("llava")[0].model.language_model)


def loaded(model):
    model.load_state_dict(families.build("llava", seed=1, sharp=SHARP)[0].state_dict())


def written(model):
    with torch.no_grad():
        model.get_parameter("model.multi_modal_projector.linear_1.weight").mul_(1.5)


def replaced(model):
    parameter = model.get_parameter("model.multi_modal_projector.linear_1.weight")
    parameter.data = parameter.data * 1.5


@pytest.mark.parametrize("change", [loaded, written, replaced])
def test_features_of_earlier_weights_are_not_used(change):
    model, processor, store = cached("llava")
    batch = families.batch(processor, [2])
    logits(model, batch)
    plain = frozen("llava")[0]
    change(model)
    change(plain)
    assert torch.equal(logits(model, batch), logits(plain, batch))
    assert len(store) == 2  # the earlier ones are gone


def test_features_belong_to_a_precision():
    model, processor, store = cached("llava")
    plain = frozen("llava")[0]
    batch = families.batch(processor, [2])
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(model, batch)
        assert torch.equal(low, logits(plain, batch))
    assert torch.equal(logits(model, batch), logits(plain, batch))
    assert len(store) == 4 and not torch.equal(low, logits(model, batch))
    model.to(torch.bfloat16)
    assert torch.equal(logits(model, batch), logits(plain.to(torch.bfloat16), batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_generates_outside_autocast_reads_the_features_that_scores_inside_read(family):
    """As `generate` of a PEFT model does it, beside forwards that accelerate has wrapped."""
    model, processor = frozen(family)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    cache_image_features(model, FeatureStore(GIB), precision=autocast)
    batch = families.batch(processor, [several(family), 1], padding_side="left")
    with autocast():
        expected = logits(frozen(family)[0], batch)
    with watched(model) as passes:
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        outside = logits(model, batch)
        once = len(passes)
        with autocast():
            assert torch.equal(logits(model, batch), expected)
            # As DeepSpeed's and FSDP's callers, who round pixels before the tower does.
            rounded = batch | {"pixel_values": batch["pixel_values"].bfloat16()}
            assert_close(logits(model, rounded), expected, rtol=0.1, atol=0.1)
    assert len(passes) == once > 0
    assert_close(outside, logits(frozen(family)[0], batch), rtol=0.1, atol=0.1)


# Towers that are split among processes


def split(monkeypatch, others_miss=False):
    model, processor = frozen("llava")
    store, asked = FeatureStore(GIB), []

    def on_any_process(here, args, kwargs):
        asked.append(here)
        return here or others_miss

    monkeypatch.setattr(feature_cache, "_on_any_process", on_any_process)
    cache_image_features(model, store, is_split=True)
    return model, processor, store, asked


def test_a_split_tower_encodes_each_time_where_processes_may_come_at_different_times(monkeypatch):
    model, processor, store, asked = split(monkeypatch)
    with watched(model) as passes:
        for _ in range(2):
            logits(model, families.batch(processor, [2]))
    assert len(passes.rows()) == 4 and not asked and not len(store)


def test_a_split_tower_encodes_an_image_once_where_all_processes_come_together(monkeypatch):
    model, processor, store, asked = split(monkeypatch)
    batch = families.batch(processor, [2])
    with watched(model) as passes, store.used_in_split_towers("agree"):
        assert torch.equal(logits(model, batch), logits(model, batch))
        # What a process holds of the weights is another tensor in each pass.
        parameter = model.get_parameter("model.multi_modal_projector.linear_1.weight")
        parameter.data = parameter.data.clone()
        logits(model, batch)
    assert len(passes.rows()) == 2 and asked == [True, False, False]


def test_a_process_that_has_all_features_runs_a_split_tower_for_one_that_has_not(monkeypatch):
    model, processor, store, asked = split(monkeypatch, others_miss=True)
    batch = families.batch(processor, [2])
    with watched(model) as passes, store.used_in_split_towers("agree"):
        assert torch.equal(logits(model, batch), logits(model, batch))
    assert [len(pixels) for pixels in passes.pixels] == [2, 1] and asked == [True, False]


def test_a_tower_that_is_gathered_asks_nobody(monkeypatch):
    model, processor, store, asked = split(monkeypatch)
    with watched(model) as passes:
        for how in ("gathered", "agree"):
            with store.used_in_split_towers(how):
                logits(model, families.batch(processor, [2]))
    assert len(passes.rows()) == 2 and asked == [False]


def test_a_split_tower_of_another_form_still_asks(monkeypatch):
    """Else the other processes would wait for an answer."""
    model, processor, store, asked = split(monkeypatch)
    with store.used_in_split_towers("agree"):
        pixels = families.batch(processor, [1])["pixel_values"]
        model.get_image_features(pixel_values=pixels, output_hidden_states=True)
    assert asked == [True]


def test_features_made_in_inference_mode_serve_where_gradients_are_made():
    model, processor, _ = cached("llava")
    batch = families.batch(processor, [1])
    with torch.inference_mode():
        model(**batch)
    weight = model.get_parameter("lm_head.weight").requires_grad_(True)
    with watched(model) as passes:
        model(**batch).logits.sum().backward()
    assert not passes.pixels and weight.grad.abs().max() > 0


def test_a_caller_who_asks_for_more_than_features_gets_it():
    model, processor, store = cached("llava")
    batch = families.batch(processor, [1])
    output = model.get_image_features(pixel_values=batch["pixel_values"], output_hidden_states=True)
    assert output.hidden_states is not None and len(store) == 0
    assert isinstance(model.get_image_features(pixel_values=batch["pixel_values"], return_dict=False), tuple)


def test_rows_without_images_change_nothing():
    for family in ("llava", "idefics3", "smolvlm", "qwen2_5_vl"):
        plain, processor = frozen(family)
        model, _, _ = cached(family)
        for images in ([0, 1], [1, 0], [0, 0], [0, 2], [1, 0]):
            batch = families.batch(processor, images)
            assert_the_same(family, logits(model, batch), logits(plain, batch))


# Several models


def test_models_whose_towers_are_equal_encode_an_image_once_for_both():
    folder = families.saved("llava", sharp=SHARP)
    store = FeatureStore(GIB)
    policy, processor = frozen("llava")
    others = [load_reward_model(folder).requires_grad_(False), frozen("llava", seed=1)[0]]
    for model in (policy, *others):
        cache_image_features(model, store)
    batch = families.batch(processor, [2])
    with watched(policy, *others) as passes:
        logits(policy, batch)
        logits(others[0], batch)
        assert len(passes.pixels) == 1
        logits(others[1], batch)
        assert len(passes.pixels) == 2
    plain = load_reward_model(folder)
    plain.score.load_state_dict(others[0].score.state_dict())
    assert torch.equal(logits(others[0], batch), logits(plain, batch))
    assert torch.equal(logits(others[1], batch), logits(frozen("llava", seed=1)[0], batch))


def test_quantized_towers_are_not_compared():
    """Equal codes may stand for other weights: their scales are no parameters."""
    store, models = FeatureStore(GIB), [frozen("llava")[0] for _ in range(2)]
    for model in models:
        vision_tower(model).register_buffer("codes", torch.zeros(2, dtype=torch.uint8))
        cache_image_features(model, store)
    batch = families.batch(families.load_processor("llava"), [1])
    with watched(*models) as passes:
        for model in (*models, *models):
            logits(model, batch)
    assert len(passes.pixels) == 2


def test_a_copy_of_a_model_uses_its_own_weights():
    model, processor, store = cached("llava")
    batch = families.batch(processor, [1])
    logits(model, batch)
    other = copy.deepcopy(model)
    written(other)
    plain = frozen("llava")[0]
    written(plain)
    assert torch.equal(logits(other, batch), logits(plain, batch)) and len(store) == 1


def test_the_cache_can_be_taken_away():
    model, processor, store = cached("llava")
    stop_caching(model)
    stop_caching(model)
    with watched(model) as passes:
        for _ in range(2):
            logits(model, families.batch(processor, [1]))
    assert len(passes.pixels) == 2 and len(store) == 0


# The store


def features(values):
    return Features(dict, False, [[torch.ones(values)]], torch.device("cpu"))


def test_the_store_keeps_the_last_used_features_up_to_its_limit(caplog):
    store = FeatureStore(limit=100)
    with caplog.at_level(logging.WARNING, "trl_vlm"):
        store.keep(("a",), features(10))
        store.keep(("b",), features(10))
        assert store.size == 80 and not caplog.records
        assert store.find(("a",)) is not None
        store.keep(("c",), features(10))
        store.keep(("too large",), features(26))
    assert [key for key in ("a", "b", "c", "too large") if store.find((key,)) is not None] == ["a", "c"]
    assert store.size == 80
    assert len(caplog.records) == 1 and "`image_feature_cache`" in caplog.text


def test_the_least_recently_used_features_go_first():
    store = FeatureStore(limit=100)
    for key in "abc":
        store.keep((key,), features(10))
        store.find(("a",))
    assert [key for key in "abc" if store.find((key,)) is not None] == ["a", "c"]


def test_kept_features_hold_no_memory_of_other_images():
    model, processor, store = cached("llava")
    logits(model, families.batch(processor, [2, 2]))
    kept = [tensor for entry in store._kept.values() for layer in entry.layers for tensor in layer]
    assert len(kept) == 4
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == store.size


def test_a_store_that_is_too_small_costs_passes_and_no_digits():
    plain, processor = frozen("llava")
    model, _, store = cached("llava", limit=1.0)
    batch = families.batch(processor, [2, 1])
    for _ in range(2):
        assert torch.equal(logits(model, batch), logits(plain, batch))
    assert store.size == 0


# What is in an image


def contents(**arguments):
    return ImageCall.of(arguments).contents()


def test_images_are_told_apart_by_every_value_and_by_what_belongs_to_them():
    pixels = torch.rand(2, 3, 8, 8)
    one, other = contents(pixel_values=pixels)
    assert one != other and contents(pixel_values=pixels.flip(0)) == [other, one]
    for place in ((0, 0, 0, 0), (0, 2, 7, 7)):
        changed = pixels.clone()
        changed[place] += 1e-6
        assert contents(pixel_values=changed)[0] != one and contents(pixel_values=changed)[1] == other
    assert contents(pixel_values=pixels.flip(-1))[0] != one
    assert contents(pixel_values=pixels.bfloat16())[0] != one
    assert contents(pixel_values=pixels, vision_feature_layer=-1)[0] != one
    sized = [contents(pixel_values=pixels, image_sizes=torch.tensor([[8, size]] * 2))[0] for size in (4, 8)]
    assert sized[0] != sized[1]


def test_pixels_that_a_caller_has_rounded_are_those_that_the_tower_rounds():
    pixels = torch.rand(2, 3, 8, 8)
    read = [
        ImageCall.of({"pixel_values": each}).contents(None, torch.bfloat16) for each in (pixels, pixels.bfloat16())
    ]
    assert read[0] == read[1] != contents(pixel_values=pixels)
    kept = ImageCall.of({"pixel_values": pixels.bfloat16()}).contents(None, torch.float32)  # nothing to round
    assert kept == contents(pixel_values=pixels.bfloat16())


def test_patches_belong_to_the_image_of_their_grid():
    patches = torch.rand(8, 12)
    grids = [torch.tensor(each) for each in ([[1, 2, 2], [1, 2, 2]], [[1, 1, 4], [1, 4, 1]])]
    found = [contents(pixel_values=patches, image_grid_thw=grid) for grid in grids]
    assert len({key for keys in found for key in keys}) == 4
    call = ImageCall.of({"pixel_values": patches, "image_grid_thw": grids[0]})
    part = call.part([1])
    assert torch.equal(part["pixel_values"], patches[4:]) and torch.equal(part["image_grid_thw"], grids[0][1:])


def test_tiles_of_padding_are_no_part_of_an_image():
    tiles = torch.rand(1, 2, 3, 8, 8)
    padded = torch.cat([tiles, torch.zeros(1, 3, 3, 8, 8)], dim=1)
    sizes = torch.tensor([[8, 16]])
    assert contents(pixel_values=tiles, image_sizes=sizes) == contents(pixel_values=padded, image_sizes=sizes)


def test_large_images_are_told_apart_behind_the_first_block():
    pixels = torch.rand(1, 3, 400, 400)
    changed = pixels.clone()
    changed[0, 2, 399, 399] += 1e-6
    assert contents(pixel_values=pixels) != contents(pixel_values=changed)
    swapped = pixels.flatten()
    swapped = torch.cat([swapped[2**18 :], swapped[: 2**18]]).view_as(pixels)
    assert contents(pixel_values=pixels) != contents(pixel_values=swapped)


def test_calls_of_another_form_are_left_alone():
    pixels = torch.rand(2, 3, 8, 8)
    for more in (
        {"image_sizes": torch.ones(3, 2)},  # not one per image
        {"mask": torch.ones(2)},  # unknown
        {"return_dict": False},
        {"output_attentions": True},
        {"image_grid_thw": torch.ones(2, 3, dtype=torch.long)},
    ):
        assert ImageCall.of({"pixel_values": pixels, **more}) is None
    assert ImageCall.of({"pixel_values": None}) is None
