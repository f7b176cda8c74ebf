"""What prepares a model for any trainer, function by function."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import deepspeed as deepspeed_integration

from tests.families import build, saved
from tests.trainers.ppo.helpers import lora
from trl_vlm import GRPOConfig
from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.checks import refuse, refuse_negative
from trl_vlm.trainers.preparation import keep_float_outputs, layers_to_wrap, wasted_precision


@pytest.mark.parametrize(
    "family, layers",
    [
        ("llava", ["CLIPEncoderLayer", "LlamaDecoderLayer"]),
        ("qwen2_5_vl", ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]),
        ("gemma3", ["Gemma3DecoderLayer", "SiglipEncoderLayer"]),
    ],
)
def test_fsdp_wraps_the_layers_that_the_model_has(family, layers):
    model, _ = build(family)
    assert set(layers) <= set(layers_to_wrap(model))
    names = {type(module).__name__ for module in model.modules()}
    assert set(layers_to_wrap(model)) <= names
    if family == "llava":  # what accelerate would have asked for
        assert not set(model._no_split_modules) <= names


def test_a_model_that_names_no_layers_leaves_the_choice_to_accelerate():
    assert layers_to_wrap(nn.Linear(2, 2)) is None


def test_what_excludes_each_other_is_refused_with_the_reason():
    refuse("a stream", {"`one`": (False, "it is off")})
    with pytest.raises(ValueError, match="^`two` cannot be combined with a stream: it reads. Unset one of the two.$"):
        refuse("a stream", {"`one`": (False, "it is off"), "`two`": (True, "it reads")})


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("-inf")])
def test_negative_values_and_no_numbers_are_refused(value):
    refuse_negative({"rate": 0.0, "other": None}, "it climbs")
    with pytest.raises(ValueError, match="`rate` is .*; it must not be negative: it climbs. Set it to 0 or more."):
        refuse_negative({"rate": value}, "it climbs")


def test_frozen_weights_in_float32_on_an_accelerator_are_named_with_the_remedy():
    with torch.device("meta"):  # any device but the CPU
        large = nn.Linear(2**15, 2**15, bias=False).requires_grad_(False)
    assert "4 GiB of frozen weights in float32" in wasted_precision(large)
    assert '`model_init_kwargs={"dtype": "bfloat16"}`' in wasted_precision(large)
    assert wasted_precision(large.bfloat16()) is None
    assert wasted_precision(large.float().requires_grad_(True)) is None  # what trains may well be in float32
    assert wasted_precision(nn.Linear(2, 2).requires_grad_(False)) is None


def test_arithmetic_in_float32_beside_4bit_weights_is_named_with_the_remedy():
    with torch.device("meta"):
        model = nn.Linear(2, 2).requires_grad_(False)
    model.config = SimpleNamespace(quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert "`BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16)`" in wasted_precision(model)
    model.config.quantization_config.bnb_4bit_compute_dtype = torch.bfloat16
    assert wasted_precision(model) is None


def test_fsdp2_gives_outputs_as_the_model_computes_them():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    keep_float_outputs(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.output_dtype, policy.param_dtype) == (None, torch.bfloat16)
    for untouched in (None, FullyShardedDataParallelPlugin(fsdp_version=2)):
        keep_float_outputs(untouched)
        assert untouched is None or untouched.mixed_precision_policy is None


def test_what_a_preset_reaches_is_found_under_zero3_too(tmp_path, monkeypatch):
    """ZeRO-3 would split the layers without weights that are looked at."""
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    expected = complete_peft_config(lora(target_modules="language-model"), str(saved("llava")), args)
    config = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed_integration, "_hf_deepspeed_config_weak_ref", lambda: config)
    found = complete_peft_config(lora(target_modules="language-model"), str(saved("llava")), args)
    assert found.target_modules == expected.target_modules and len(found.target_modules) > 4
