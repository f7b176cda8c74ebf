"""Under FSDP2 the output head gets the gradient of one process that has the batches of all."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from trl_vlm.trainers._trl import add_fused_lm_head
from trl_vlm.trainers.fsdp import reduce_gradient_of_head

BATCHES = torch.tensor([[[1, 2, 3, 4]], [[5, 6, 7, 0]]])


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
    add_fused_lm_head(model)
    return model


def backward(model: LlamaForCausalLM, batch: Tensor) -> None:
    model(input_ids=batch, labels=batch, fused_lm_head=True).loss.backward()


def one_of_two(rank: int, folder: Path, passes: int, is_reduced: bool) -> None:
    """What each process does: `passes` without gradient, then one with it, as accelerate shards LLaVA."""
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_model()
    if is_reduced:
        reduce_gradient_of_head(model)
    fully_shard(model.lm_head, reshard_after_forward=False)
    fully_shard(model)
    for _ in range(passes):
        with torch.no_grad():
            model(input_ids=BATCHES[rank], labels=BATCHES[rank], fused_lm_head=True)
    backward(model, BATCHES[rank])
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    destroy_process_group()


def gradients_of_two(folder: Path, passes: int, is_reduced: bool) -> dict[str, Tensor]:
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=one_of_two, args=(rank, folder, passes, is_reduced)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    return torch.load(folder / "gradients.pt")


@pytest.fixture(scope="module")
def mean_gradients():
    model = tiny_model()
    for batch in BATCHES:
        backward(model, batch)
    return {name: parameter.grad / len(BATCHES) for name, parameter in model.named_parameters()}


@pytest.mark.distributed
@pytest.mark.parametrize("passes", [0, 1], ids=["first forward", "after a forward without gradient"])
def test_the_gradient_of_the_head_is_the_mean_over_processes(passes, mean_gradients, tmp_path):
    found = gradients_of_two(tmp_path, passes, is_reduced=True)
    assert found.keys() == mean_gradients.keys()
    for name, gradient in mean_gradients.items():
        assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.distributed
def test_trl_still_gives_each_process_the_gradient_of_its_own_batch(mean_gradients, tmp_path):
    """When this fails, `trl_vlm/trainers/fsdp.py` can be deleted."""
    found = gradients_of_two(tmp_path, 0, is_reduced=False)
    model = tiny_model()
    backward(model, BATCHES[0])
    assert_close(found["lm_head.weight"][:4], model.lm_head.weight.grad[:4])  # the rows that the first process stores
    assert_close(found["model.norm.weight"], mean_gradients["model.norm.weight"])
    with pytest.raises(AssertionError, match="lm_head"):
        assert_close(found["lm_head.weight"], mean_gradients["lm_head.weight"], msg=lambda text: f"lm_head: {text}")
