"""Sharing a prompt gives the hidden states, and the gradients, of computing it once per reply."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import LlamaForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tests.families import FAMILIES, build, saved
from tests.preference_rows import preference_row
from trl_vlm.data.encoding import RewardCollator
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.families import IMAGE_INPUTS
from trl_vlm.models.prefix_sharing.attention import ATTENTION
from trl_vlm.models.prefix_sharing.sharing import (
    SHARED_PREFIX,
    SHARING_FAMILIES,
    _Pack,
    share_pairs,
    share_prefix,
    why_not_shareable,
)
from trl_vlm.models.reward_model import load_reward_model
from trl_vlm.trainers.dpo.collator import PreferenceCollator

SPECIAL_MASKS = ("gemma3", "paligemma", "qwen3_vl")
# PaliGemma 2 has windows, which are shorter than the rows here.
MORE_SHARING = ("gemma4", "llava_onevision", "paligemma2", "qwen3_vl_moe")


def batches(processor, images=(1, 2, 0), extra: int = 0):
    """The same rows twice: plain, and with images once per row and the key that says which sequences share one."""
    rows = [preference_row(seed, count) for seed, count in enumerate(images)]
    for number, row in enumerate(rows):
        row["prompt"][0]["content"] *= 1 + number  # prompts of different lengths
        extras = ["No.", "A dog and a dog.", "The wall is red."]
        row["rejected_extra"] = [[{"role": "assistant", "content": text}] for text in extras[:extra]]
    for share in (False, True):
        collate = DataCollatorForVisionPreference(processor)
        collator = PreferenceCollator(
            collate, vision=True, tokenizer=processor.tokenizer, extra=extra, shares_prefix=share
        )
        yield dict(collator(rows))


def hidden_states_and_gradients(model, batch):
    """Hidden states (N, T, H) where replies are predicted, and the gradients of a loss that tells them all apart."""
    batch = dict(batch)
    is_reply = batch.pop("completion_mask").bool()
    states = model.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]
    states = states * is_reply[:, 1:, None]
    weights = torch.linspace(-1, 1, states.numel()).view(states.shape)
    model.zero_grad()
    (states * weights).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return states.detach(), gradients


def assert_equal_gradients(found, wanted, tolerance: float = 1e-4):
    assert found.keys() == wanted.keys()
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        if "vision" in name and name.endswith("k_proj.bias"):
            # A softmax ignores what all keys have in common: this gradient is zero, and what is there is rounding.
            assert max(found[name].norm(), gradient.norm()) < 1e-6 * largest, name
        else:
            assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


def assert_sharing_changes_nothing(model, processor, **rows):
    plain, shared = batches(processor, **rows)
    wanted, wanted_gradients = hidden_states_and_gradients(model, plain)
    share_prefix(model)
    found, found_gradients = hidden_states_and_gradients(model, shared)
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert_equal_gradients(found_gradients, wanted_gradients)


def sharp(family: str):
    """A model that sees its images and positions; the usual initialisation is nearly blind."""
    model, processor = build(family, sharp=6.0)
    return model.train(), processor


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_SHARING])
def test_hidden_states_and_every_gradient_equal_the_plain_path_with_no_one_and_two_images(family):
    assert_sharing_changes_nothing(*sharp(family))


@pytest.mark.parametrize("family", ["llava", *SPECIAL_MASKS])
def test_four_replies_share_a_prompt_like_two(family):
    assert_sharing_changes_nothing(*sharp(family), images=(1, 1), extra=2)


@pytest.mark.parametrize("family", ["llava", *SPECIAL_MASKS, "paligemma2"])
def test_eager_attention_equals_its_plain_path(family):
    model, processor = sharp(family)
    model.set_attn_implementation("eager")
    assert_sharing_changes_nothing(model, processor, images=(1, 0))


@pytest.mark.parametrize("family", ["llava", *SPECIAL_MASKS])
def test_gradient_checkpointing_changes_no_gradient(family):
    model, processor = sharp(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_sharing_changes_nothing(model, processor, images=(1, 0))


@pytest.mark.parametrize("kinds", [None, ["sliding_attention", "full_attention"]])
def test_a_window_narrower_than_the_sequences_stays_in_force(kinds):
    # Mistral has one window for all layers, Qwen2 has layers with and without.
    model, processor = sharp("llava" if kinds is None else "internvl")
    text = model.config.get_text_config()
    if kinds is None:
        from transformers import MistralConfig, MistralModel

        config = MistralConfig(**{**text.to_dict(), "sliding_window": 12, "model_type": "mistral"})
        config._attn_implementation = "sdpa"
        model.config.text_config = config
        model.model.language_model = MistralModel(config)
        torch.manual_seed(0)
        for parameter in model.model.language_model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    else:
        text.sliding_window, text.layer_types, text.use_sliding_window = 12, kinds, True
        model.model.language_model.has_sliding_layers = True
        for layer, kind in zip(model.model.language_model.layers, kinds, strict=True):
            layer.attention_type = kind
            layer.self_attn.sliding_window = text.sliding_window if kind == "sliding_attention" else None
    assert_sharing_changes_nothing(model, processor, images=(1, 0))


def test_image_tokens_of_gemma4_may_see_each_other():
    model, processor = sharp("gemma4")
    model.config.get_text_config().use_bidirectional_attention = "vision"
    assert_sharing_changes_nothing(model, processor, images=(1, 2))


@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
def test_the_window_test_would_notice_a_window_that_is_ignored(family):
    model, processor = sharp(family)
    plain, _ = batches(processor)
    wanted, _ = hidden_states_and_gradients(model, plain)
    model.config.get_text_config().sliding_window = 1000
    found, _ = hidden_states_and_gradients(model, plain)
    assert (found - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_tower_sees_each_image_once(family):
    model, processor = build(family)
    plain, shared = batches(processor, images=(1, 1))
    pixels = {name: value for name, value in shared.items() if name.startswith("pixel_values")}
    assert pixels and all(2 * value.size(0) == plain[name].size(0) for name, value in pixels.items())
    calls = []
    tower = next(
        module for name, module in model.named_modules() if name.endswith(("vision_tower", "vision_model", "visual"))
    )
    tower.register_forward_hook(lambda *_: calls.append(1))
    share_prefix(model)
    shared.pop("completion_mask")
    model.base_model(**shared, use_cache=False)
    assert len(calls) == 1


def test_a_prompt_is_computed_once_for_its_replies():
    model, processor = build("llava")
    plain, shared = batches(processor, images=(1, 1), extra=2)
    seen = []
    share_prefix(model)
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    shared.pop("completion_mask")
    states = model.base_model(**shared, use_cache=False).last_hidden_state
    assert states.shape[:2] == plain["input_ids"].shape
    prompts = shared[SHARED_PREFIX][:, 1]
    replies = shared["attention_mask"].sum(1) - prompts
    assert seen == [(1, prompts[:2].sum() + replies.sum(), 32)]  # without any padding


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_sequences_in_any_order_padded_on_the_left_share_their_prompts(family):
    model, processor = sharp(family)
    plain, shared = batches(processor, images=(0, 0), extra=1)
    order, width = torch.tensor([3, 0, 5, 1, 2, 4]), shared["input_ids"].size(1)
    lengths = shared["attention_mask"].sum(1)[order].tolist()
    shape = shared["input_ids"].shape

    def moved(batch):
        """With all replies ending in the last column."""
        tokens = {name: batch[name][order] for name in batch if getattr(batch[name], "shape", None) == shape}
        return batch | {
            name: torch.stack([one.roll(width - length) for one, length in zip(value, lengths, strict=True)])
            for name, value in tokens.items()
        }

    wanted, wanted_gradients = hidden_states_and_gradients(model, moved(plain))
    share_prefix(model)
    moved_shared = moved(shared) | {SHARED_PREFIX: shared[SHARED_PREFIX][order]}
    found, found_gradients = hidden_states_and_gradients(model, moved_shared)
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert_equal_gradients(found_gradients, wanted_gradients, 1e-3)


def test_a_batch_that_would_take_longer_is_computed_as_without_sharing():
    model, _ = build("llava")
    share_prefix(model)
    sizes = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[:2])))
    # Two replies of 60 tokens to a prompt of 6, and of 6 to one of 60.
    for prompt in (6, 60):
        ids = torch.randint(110, 120, (2, 66))
        ids[1, :prompt] = ids[0, :prompt]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        shared = batch | {SHARED_PREFIX: torch.tensor([[0, prompt], [0, prompt]])}
        states = model.base_model(**batch, use_cache=False).last_hidden_state
        assert_close(model.base_model(**shared, use_cache=False).last_hidden_state, states, rtol=1e-4, atol=1e-5)
    assert sizes == [(2, 66), (2, 66), (2, 66), (1, 72)]


def test_lora_trains_through_it():
    model, processor = sharp("llava")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert_sharing_changes_nothing(peft.get_base_model(), processor)


def test_bfloat16_is_as_near_to_float32_as_the_plain_path_is():
    model, processor = sharp("llava")
    plain, shared = batches(processor, images=(1, 1))
    wanted, _ = hidden_states_and_gradients(model, plain)
    model = model.to(torch.bfloat16)
    plain, shared = ({k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()} for b in (plain, shared))
    plain_states, _ = hidden_states_and_gradients(model, plain)
    share_prefix(model)
    states, gradients = hidden_states_and_gradients(model, shared)
    assert states.dtype == torch.bfloat16
    assert (states - wanted).norm() < 1.5 * (plain_states - wanted).norm()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_batch_without_the_key_and_generation_are_untouched():
    model, processor = build("gemma3", sharp=6.0)
    plain, _ = batches(processor, images=(1, 0))
    plain.pop("completion_mask")
    wanted = model(**plain).logits
    tokens = model.generate(**plain, max_new_tokens=5, do_sample=False)
    share_prefix(model)
    assert_close(model(**plain).logits, wanted)
    assert torch.equal(model.generate(**plain, max_new_tokens=5, do_sample=False), tokens)


def test_sharing_twice_is_sharing_once_and_leaves_no_trace_in_a_saved_config(tmp_path):
    model, _ = build("llava")
    share_prefix(model)
    share_prefix(model)
    assert len(model.base_model._forward_pre_hooks) == 1
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


def test_every_family_that_is_on_is_tested_and_others_say_why_not():
    tested = {build(family)[0].config.model_type for family in [*FAMILIES, *MORE_SHARING]}
    assert set(SHARING_FAMILIES) == tested
    model, _ = build("llava")
    assert why_not_shareable(model.config) is None
    model.config.get_text_config()._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' is not known to keep .* attn_implementation='sdpa'"):
        share_prefix(model)
    model.config.get_text_config()._attn_implementation = "sdpa"
    text_model = LlamaForCausalLM(model.config.get_text_config())
    with pytest.raises(ValueError, match="llama is not among the tested families .* has no image tokens"):
        share_prefix(text_model)
    hybrid, _ = build("qwen3_5")
    with pytest.raises(ValueError, match="layers of type linear_attention cannot keep the replies apart"):
        share_prefix(hybrid)
    experts, _ = build("qwen3_vl_moe")
    experts.config.get_text_config().output_router_logits = True
    with pytest.raises(ValueError, match="auxiliary loss of mixtures of experts counts every token"):
        share_prefix(experts)


def test_states_on_another_device_than_the_batch_are_unpacked_there():
    pack = _Pack(is_proven=True)
    pack.target = torch.tensor([[0, 1]])  # of the batch; the last layer is elsewhere
    output = pack.unpack(None, (), SimpleNamespace(last_hidden_state=torch.empty(1, 3, 4, device="meta")))
    assert output.last_hidden_state.shape == (1, 2, 4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "paligemma"])
def test_a_reward_model_scores_pairs_as_without_sharing(family):
    _, processor = build(family)
    torch.manual_seed(0)
    model = load_reward_model(str(saved(family, sharp=6.0)))
    rows = [preference_row(seed, count) for seed, count in enumerate((1, 2, 0))]
    batch = RewardCollator(processor, JudgeTemplate())(rows)
    batch.pop("margin")
    shared = share_pairs(batch, model.config)
    wanted = model(**batch).logits
    wanted.diff(dim=0).abs().sum().backward()
    wanted_gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    share_prefix(model)
    model.zero_grad()
    found = model(**shared).logits
    found.diff(dim=0).abs().sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert_equal_gradients(gradients, wanted_gradients)
    assert all(2 * len(shared[name]) == len(batch[name]) for name in batch if name in IMAGE_INPUTS)


def test_paligemma_shares_nothing_in_whole_conversations():
    model, _ = build("paligemma")
    with pytest.raises(ValueError, match="paligemma reads a conversation that was encoded as a whole as one prompt"):
        share_pairs({}, model.config)
