"""A family that no test knows shares prefixes if its first batch comes out the same in both ways."""

import logging

import pytest
import torch
from torch.testing import assert_close

from tests.distributed import launch
from tests.families import batch, build, saved
from tests.models.prefix_sharing.distributed_main import rejected
from tests.models.prefix_sharing.test_prefix_sharing import (
    assert_equal_gradients,
    batches,
    hidden_states_and_gradients,
)
from trl_vlm.models import families
from trl_vlm.models.prefix_sharing import sharing, trial
from trl_vlm.models.prefix_sharing.sharing import _Pack, share_prefix, why_not_shareable


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def unknown(request, monkeypatch):
    """A model of a family that is not in the table, its processor, and the hook that shares prefixes."""
    model, processor = build(request.param, sharp=6.0)
    monkeypatch.delitem(families.FAMILIES, model.config.model_type)
    share_prefix(model)
    (hook,) = (hook for hook in model.base_model._forward_pre_hooks.values() if isinstance(hook, _Pack))
    return model.train(), processor, hook


def passes(model) -> list[int]:
    """How many sequences the language model reads, in every pass from now on."""
    sequences = []
    layer = model.base_model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: sequences.append(args[0].size(0)))
    return sequences


def test_a_family_that_agrees_shares_from_its_first_batch_on(unknown, caplog):
    model, processor, hook = unknown
    assert why_not_shareable(model.config) is None and hook.is_proven is None
    plain, shared = batches(processor, images=(1, 2, 0))
    wanted, wanted_gradients = hidden_states_and_gradients(model, plain)
    sequences = passes(model)
    with caplog.at_level(logging.INFO, logger=trial.__name__):
        found, gradients = hidden_states_and_gradients(model, shared)
        hidden_states_and_gradients(model, shared)
    assert hook.is_proven and model.training
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert_equal_gradients(gradients, wanted_gradients)
    assert sequences == [6, 1, 1, 1]  # the trial, plain and shared, and two batches
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_family_that_disagrees_takes_the_plain_path_for_good(unknown, caplog, monkeypatch):
    model, processor, hook = unknown
    plain, shared = batches(processor, images=(1, 2, 0))
    wanted, wanted_gradients = hidden_states_and_gradients(model, plain)
    # Replies that start at a wrong position: nothing fails, and everything is a little off.
    right = sharing._positions
    monkeypatch.setattr(
        sharing, "_positions", lambda backbone, slots, packed: right(backbone, slots, packed) + rejected(slots)
    )
    for _ in range(2):
        found, gradients = hidden_states_and_gradients(model, shared)
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert_equal_gradients(gradients, wanted_gradients)
    assert hook.is_proven is False
    (record,) = caplog.records
    assert "prompts are computed once per reply, not once per row: replies after a common prompt come out" in (
        record.message
    )


def test_a_family_that_cannot_read_a_packed_batch_takes_the_plain_path(unknown, caplog, monkeypatch):
    model, processor, hook = unknown
    plain, shared = batches(processor, images=(1, 1))
    wanted, _ = hidden_states_and_gradients(model, plain)

    def fails(*args):
        raise ValueError("masks of this kind are unknown here")

    monkeypatch.setattr(sharing, "layout_of", fails)
    found, _ = hidden_states_and_gradients(model, shared)
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert hook.is_proven is False
    assert "cannot read replies after a common prompt (ValueError: masks of this kind" in caplog.text


def test_the_first_columns_are_left_out_on_the_plain_path_too(unknown, monkeypatch):
    model, processor, _ = unknown
    plain, shared = batches(processor, images=(1, 1))
    for name in ("completion_mask", "shared_prefix"):
        plain.pop(name, None)
    shared.pop("completion_mask")
    monkeypatch.setattr(sharing, "gives_the_same", lambda *args: False)
    with torch.no_grad():
        wanted = model.base_model(**plain, use_cache=False).last_hidden_state
        found = model.base_model(**shared, shared_prefix_first_column=5, use_cache=False).last_hidden_state
    assert_close(found, wanted[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "disagreeing"), [("ddp", None), ("ddp", 1), ("zero3", 1)])
def test_all_processes_decide_alike_also_when_the_batch_of_one_disagrees(kind, disagreeing, tmp_path):
    more = {"model": str(saved("llava", sharp=4.0)), "disagreeing": disagreeing}
    report = launch("tests/models/prefix_sharing/distributed_main.py", kind, processes=2, folder=tmp_path, **more)
    agree = disagreeing is None
    assert report["proven"] == [agree, agree]
    assert report["sequences"] == ([1, 1] if agree else [4, 4])  # of two rows, in the last forward
    assert report["losses"] == pytest.approx(report["plain"], abs=1e-5)


def test_a_known_family_is_tried_where_its_kernels_are_others():
    model, _ = build("llava")
    share_prefix(model, is_tested=False)  # as with Liger kernels
    (hook,) = (hook for hook in model.base_model._forward_pre_hooks.values() if isinstance(hook, _Pack))
    assert hook.is_proven is None


def test_sequences_in_another_order_are_refused():
    _, processor = build("llava")
    inputs = {**batch(processor, [1, 1]), "shared_prefix": torch.tensor([[1, 3], [0, 3]])}
    with pytest.raises(ValueError, match=r"belong to the rows \[1, 0\], not \[0, 1\]"):
        trial.plain_inputs(inputs, sharing.KEYS)
