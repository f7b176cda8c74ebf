"""Attention of packed batches in kernels of variable length, through slow stand-ins with their signatures."""

import functools
import logging

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, modeling_flash_attention_utils
from transformers.integrations import flash_attention

from benchmarks import flash_stand_in
from tests.families import FAMILIES
from tests.models.prefix_sharing.test_prefix_sharing import assert_sharing_changes_nothing, batches, sharp
from trl_vlm.models.prefix_sharing import attention, trial, varlen
from trl_vlm.models.prefix_sharing.sharing import _Pack, share_prefix

# FlashAttention takes no masks, so these families see other things with it than they should, without sharing too.
OWN_MASKS = ("gemma3", "paligemma")


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention, with slow kernels; what is registered for this test is forgotten after it."""
    name, found = "lazy_import_flash_attention", modeling_flash_attention_utils
    monkeypatch.setattr(found, name, getattr(flash_stand_in, name))
    monkeypatch.setattr(flash_attention, "_use_top_left_mask", False)
    before = AttentionInterface()["flash_attention_2"]
    yield
    AttentionInterface.register("flash_attention_2", before)


def with_flash(family: str):
    model, processor = sharp(family)
    flash_stand_in.use(model)
    return model, processor


def with_window(model, window: int):
    """A LLaVA whose language model is Mistral with a window."""
    from transformers import MistralConfig, MistralModel

    text = model.config.get_text_config()
    config = MistralConfig(**{**text.to_dict(), "sliding_window": window, "model_type": "mistral"})
    config._attn_implementation = "sdpa"  # the constructor would look for the package
    model.config.text_config = config
    model.model.language_model = MistralModel(config)
    config._attn_implementation = text._attn_implementation
    torch.manual_seed(0)
    for parameter in model.model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OWN_MASKS])
def test_flash_attention_equals_its_plain_path(family, flash, caplog):
    model, processor = with_flash(family)
    with caplog.at_level(logging.INFO, logger=trial.__name__):
        assert_sharing_changes_nothing(model, processor)
    (hook,) = (hook for hook in model.base_model._forward_pre_hooks.values() if isinstance(hook, _Pack))
    assert hook.is_proven and "shared prefixes give the same" in caplog.text  # nobody ran the kernels here before


def test_flash_attention_keeps_windows(flash):
    model, processor = with_flash("llava")
    assert_sharing_changes_nothing(with_window(model, 12), processor, images=(1, 0))


def test_flash_attention_has_one_call_per_layer_without_padding(flash, monkeypatch):
    model, processor = with_flash("llava")
    share_prefix(model)
    calls, slow = [], flash_stand_in.slow_flash_attn_varlen_func

    @functools.wraps(slow)
    def counted(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
        calls.append((len(q), len(k), len(cu_seqlens_q) - 1))
        return slow(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)

    _, shared = batches(processor, images=(1, 2))
    is_reply = shared.pop("completion_mask").bool()
    with torch.no_grad():
        model.base_model(**shared, use_cache=False)  # the trial
        monkeypatch.setattr(flash_stand_in, "slow_flash_attn_varlen_func", counted)
        model.base_model(**shared, use_cache=False)
    prompts = int((shared["attention_mask"].sum(1) - is_reply.sum(1))[:2].sum())
    queries = prompts + int(is_reply.sum())
    # Two prompts and four replies; each prompt is read by itself and by two replies.
    assert calls == [(queries, 3 * prompts + int(is_reply.sum()), 6)] * model.config.text_config.num_hidden_layers


def test_flash_attention_that_gives_other_numbers_is_found_on_the_first_batch(flash, monkeypatch, caplog):
    slow = flash_stand_in.slow_varlen

    def top_left(query, key, value, ends, key_ends, *lengths, **options):
        """As flash-attn before 2.1: the first query is aligned with the first key."""
        if len(query) == len(key):
            return slow(query, key, value, ends, key_ends, *lengths, **options)
        same = [slice(int(start), int(start + end)) for start, end in zip(key_ends, ends.diff(), strict=False)]
        key, value = (torch.cat([states[one] for one in same]) for states in (key, value))
        return slow(query, key, value, ends, ends, *lengths, **options)

    model, processor = with_flash("llava")
    monkeypatch.setattr(flash_stand_in, "slow_varlen", top_left)
    assert_sharing_changes_nothing(model, processor)
    assert "replies after a common prompt come out differently" in caplog.text


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_varlen_attention_of_torch_equals_the_plain_path(family, monkeypatch):
    model, processor = sharp(family)
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return flash_stand_in.slow_varlen(*args, **options)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(attention, "varlen_serves", lambda *states, **options: True)
    assert_sharing_changes_nothing(model, processor)
    assert len(calls) == model.config.get_text_config().num_hidden_layers
    monkeypatch.setattr(varlen, "varlen_attn", flash_stand_in.slow_varlen)
    if family == "llava":
        model, processor = sharp(family)
        assert_sharing_changes_nothing(with_window(model, 12), processor, images=(1, 0))


def test_kernels_are_taken_where_they_give_what_sdpa_gives(monkeypatch):
    cpu, half = torch.device("cpu"), torch.bfloat16
    monkeypatch.setattr(varlen, "runs_here", varlen.runs_here.__wrapped__)  # without its cache
    assert not varlen.runs_here(cpu, half, 4, 2, 16)  # torch's kernels need a GPU
    monkeypatch.setattr(varlen, "varlen_attn", flash_stand_in.slow_varlen)
    assert varlen.runs_here(cpu, half, 4, 2, 16) and varlen.runs_here(cpu, half, 4, 4, 16)
    assert not varlen.runs_here(cpu, torch.float32, 4, 2, 16)
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda *args, **options: flash_stand_in.slow_varlen(*args, **options) * 1.2
    )
    assert not varlen.runs_here(cpu, half, 4, 2, 16)


def test_gemma3_s_image_tokens_see_each_other_so_its_layout_is_no_flat_one(monkeypatch):
    model, processor = sharp("gemma3")
    monkeypatch.setattr(attention, "varlen_serves", lambda *states, **options: pytest.fail("it was asked for"))
    assert_sharing_changes_nothing(model, processor, images=(1, 0))


def test_a_packed_batch_without_its_layout_is_an_error_and_not_other_numbers():
    states = torch.zeros(1, 2, 5, 4)
    empty = attention.empty_mask(torch.device("cpu"))
    with pytest.raises(ValueError, match="does not pass keyword arguments on to its attention"):
        AttentionInterface()[attention.ATTENTION](nn.Module(), states, states, states, empty)
