"""The arithmetic of memory, against numbers by hand and against models whose bytes are counted."""

import types

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.integrations import deepspeed as deepspeed_integration

from tests.families import build
from trl_vlm.models.memory import (
    BFLOAT16,
    FLOAT32,
    FOUR_BIT,
    GIB,
    Counts,
    Layers,
    Memory,
    Precision,
    Sharding,
    Training,
    activations,
    counts_of,
    empty_model,
    head_bytes,
    held,
    trained,
)

TOWER = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
TOWER |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
LANGUAGE = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LANGUAGE |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064}


@pytest.fixture(scope="module")
def llava_7b():
    """LLaVA-1.5-7B with LoRA of rank 64 on its language model, without weights."""
    model = empty_model(transformers.LlavaConfig(vision_config=TOWER, text_config=LANGUAGE, image_token_id=32000))
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    targets = [name for name in names if "language_model" in name]
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=64, target_modules=targets))


def test_one_process_may_count_alone_under_zero3(monkeypatch):
    """The main process alone prints the plan; a model that is split while it is made would wait for the others."""
    zero3 = types.SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed_integration, "_hf_deepspeed_config_weak_ref", lambda: zero3)
    assert deepspeed_integration.is_deepspeed_zero3_enabled()
    model = empty_model(transformers.LlavaConfig(vision_config=TOWER, text_config=LANGUAGE, image_token_id=32000))
    assert all(parameter.device.type == "meta" and parameter.numel() for parameter in model.parameters())


def test_a_real_size_costs_what_published_arithmetic_says(llava_7b):
    """GiB of weights, gradients, optimizer: DPO with LoRA 15.5, QLoRA 6.7; PPO of three models 44, in float32 84."""
    counts = counts_of(llava_7b)
    assert counts.base == 7_063_427_072 and counts.adapter == 159_907_840 and counts.trained == 0
    policy = trained("policy", counts, Precision(BFLOAT16))
    assert policy.total / GIB == pytest.approx(15.5, abs=0.1)
    assert trained("policy", counts, Precision(BFLOAT16, linear=FOUR_BIT)).total / GIB == pytest.approx(6.7, abs=0.3)
    for precision, total in ((BFLOAT16, 44), (FLOAT32, 84)):
        each = Precision(precision)
        frozen = held("reward model", counts._replace(adapter=0), each)
        assert (2 * trained("policy", counts, each).total + frozen.total) / GIB == pytest.approx(total, abs=0.6)


def test_a_model_in_memory_has_the_bytes_that_are_counted():
    model, _ = build("qwen2_5_vl")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert held("policy", counts_of(model), Precision(FLOAT32)).total == size
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [state for one in optimizer.state.values() for state in one.values() if state.dim() > 0]
    policy = trained("policy", counts_of(model), Precision(FLOAT32))
    assert policy.optimizer == sum(state.numel() * state.element_size() for state in states)
    assert policy.gradients == size


def test_what_is_frozen_has_neither_gradients_nor_states():
    counts = Counts(base=100, linear=80, trained=10)
    role = trained("policy", counts, Precision(FLOAT32))
    assert (role.weights, role.gradients, role.optimizer, role.total) == (400, 40, 80, 520)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (Precision(BFLOAT16), (200, 20, 40)),
        (Precision(BFLOAT16, master=True), (200, 20, 120)),
        (Precision(FLOAT32, master=True), (400, 40, 80)),
        (Precision(BFLOAT16, states=0), (200, 20, 0)),
        (Precision(BFLOAT16, state_bytes=1), (200, 20, 20)),
        (Precision(BFLOAT16, linear=FOUR_BIT), (80 * 0.5625 + 40, 20, 40)),
    ],
    ids=["adam", "with float32 masters", "masters of float32", "sgd", "8-bit adam", "4-bit base"],
)
def test_each_precision_by_hand(precision, expected):
    role = trained("policy", Counts(base=100, linear=80, trained=10), precision)
    assert (role.weights, role.gradients, role.optimizer) == expected


def test_adapters_and_their_states_are_in_float32():
    role = trained("policy", Counts(base=100, linear=80, trained=0, adapter=5), Precision(BFLOAT16))
    assert (role.weights, role.gradients, role.optimizer) == (220, 20, 40)


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, (400, 40, 80)), (1, (400, 40, 20)), (2, (400, 10, 20)), (3, (100, 10, 20))]
)
def test_each_stage_splits_one_thing_more(stage, expected):
    counts = Counts(base=100, linear=80, trained=10)
    role = trained("policy", counts, Precision(FLOAT32), Sharding.of_stage(stage, 4))
    assert (role.weights, role.gradients, role.optimizer) == expected


SMALL = dict(num_hidden_layers=3, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2)


def language_model(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **SMALL, **options)).train()


def saved_bytes(model, tokens, rows=2, dtype=None):
    """What autograd keeps for a backward pass: each storage once, without parameters and the head's logits."""
    found, own = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address comes twice
        return tensor

    ids = torch.randint(50, (rows, tokens))
    watching = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with watching, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
        model.model(input_ids=ids, use_cache=False).last_hidden_state.sum()
    return sum(size for size, _ in found.values())


def adapted(model, dropout=0.0):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=1, target_modules=names, lora_dropout=dropout)).get_base_model()


@pytest.mark.parametrize(
    ("training", "dtype"),
    [
        (Training.ALL, None),
        (Training.ADAPTERS, None),
        (Training.DROPOUT, None),
        (Training.SEVERAL_COPIES, torch.bfloat16),
        (Training.DROPOUT, torch.bfloat16),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_layer_keeps_what_autograd_keeps(training, dtype):
    model = language_model()
    if dtype is not None:
        model = model.to(dtype)
    if training is not Training.ALL:
        model = adapted(model, 0.05 if training is Training.DROPOUT else 0.0)
        model.enable_input_require_grads()
    few, more = (saved_bytes(model, tokens, dtype=dtype) for tokens in (32, 96))
    per_token = (more - few) / (2 * 64) / SMALL["num_hidden_layers"]  # what does not depend on tokens cancels
    wanted = Layers.of_text(model.config).kept_per_token(4.0 if dtype is None else 2.0, training)
    if training is Training.DROPOUT:
        wanted += 3 * (6 * SMALL["hidden_size"] + SMALL["intermediate_size"])  # a mask has 4 bytes on a CPU, not 1
    assert wanted == pytest.approx(per_token, rel=0.12)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    layers, value = Layers(3, width=8, queries=8, keys=8, inner=16), 2.0
    one, working = layers.kept_per_token(value, Training.ALL), layers.working_per_token(value)
    assert activations(layers, 10, Training.ALL, checkpointing=False) == (30 * one + 10 * working, 10 * working)
    kept, layer = activations(layers, 10, Training.ALL, checkpointing=True)
    assert layer == 10 * (one + working) and kept == 3 * 10 * 8 * value + layer
    twice = activations(layers, 10, Training.ALL, checkpointing=True, passes=2)
    assert twice == (kept + 3 * 10 * 8 * value, layer)  # one layer is computed again at a time


def test_sizes_are_read_from_each_kind_of_configuration():
    text = transformers.LlamaConfig(**SMALL)
    assert Layers.of_text(text) == Layers(3, width=64, queries=64, keys=32, inner=160)
    tower = Layers.of_tower(transformers.CLIPVisionConfig(**TOWER))
    assert tower == Layers(24, width=1024, queries=1024, keys=1024, inner=4096, gated=False)
    qwen = build("qwen2_vl")[0].config.vision_config
    assert Layers.of_tower(qwen).inner == qwen.embed_dim * qwen.mlp_ratio
    assert Layers.of_tower(transformers.PreTrainedConfig()) is None
    experts = build("qwen3_vl_moe")[0].config.get_text_config()
    assert Layers.of_text(experts).inner == experts.num_experts_per_tok * experts.moe_intermediate_size


def test_the_head_works_on_a_part_of_the_tokens_and_words():
    config = transformers.LlamaConfig(vocab_size=100_000, hidden_size=8, num_attention_heads=2)
    assert head_bytes(config, 100, 2.0, trains=False) == 2 * 100 * 32768 + 4 * 8 * 100
    assert head_bytes(config, 9000, 2.0, trains=False) == 2 * 4096 * 32768 + 4 * 8 * 9000
    assert head_bytes(config, 100, 2.0, trains=True) - head_bytes(config, 100, 2.0, trains=False) == 4 * 8 * 100_000


def test_gradients_come_while_activations_go_unless_they_accumulate():
    role = trained("policy", Counts(base=100, linear=0, trained=100), Precision(FLOAT32))
    assert (role.weights, role.gradients, role.optimizer) == (400, 400, 800)
    assert Memory([role], activations=1000, layer=50, accumulates=False).total == 1200 + 1000
    assert Memory([role], activations=100, layer=50, accumulates=False).total == 1200 + 400 + 50
    assert Memory([role], activations=1000, layer=50).total == 1200 + 400 + 1000
    assert Memory([role], activations=10, generation=5000, layer=5).total == 1200 + 5000
    assert Memory([role], activations=10, generation=5000, layer=5, features=7).total == 1200 + 5000 + 7


def test_whether_the_tower_trains_is_counted():
    model, _ = build("llava")
    assert counts_of(model).tower
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    assert not counts_of(model).tower


def test_the_sum_names_its_parts():
    roles = [held("policy", Counts(GIB, 0, 0), Precision(BFLOAT16)), held("critic", Counts(GIB, 0, 0), Precision(1.0))]
    memory = Memory(roles, GIB / 2)
    assert memory.total == 3.5 * GIB
    assert str(memory) == "3.5 GiB (policy 2.0, critic 1.0, activations 0.5)"
