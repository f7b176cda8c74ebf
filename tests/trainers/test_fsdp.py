"""Under FSDP2 the output head gets the gradient of one process that has the batches of all."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from trl_vlm.trainers._trl import add_fused_lm_head
from trl_vlm.trainers.fsdp import reduce_gradient_of_head
from trl_vlm.trainers.types import Model, base_model

BATCHES = torch.tensor([[[1, 2, 3, 4]], [[5, 6, 7, 0]]])


def tiny_model(adapter: bool = False) -> Model:
    """A model with TRL's log-probabilities; with `adapter`, its head is trained beside an adapter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
    add_fused_lm_head(model)
    if adapter:
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    return model


def gradients_of(model: Model) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def backward(model: Model, batch: Tensor) -> None:
    model(input_ids=batch, labels=batch, fused_lm_head=True).loss.backward()


def one_of_two(rank: int, folder: Path, passes: int = 0, adapter: bool = False, is_reduced: bool = True) -> None:
    """What each process does: `passes` without gradient, then one with it, as accelerate shards LLaVA."""
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_model(adapter)
    if is_reduced:
        reduce_gradient_of_head(model)
    fully_shard(base_model(model).get_output_embeddings(), reshard_after_forward=False)
    fully_shard(model)
    for _ in range(passes):
        with torch.no_grad():
            model(input_ids=BATCHES[rank], labels=BATCHES[rank], fused_lm_head=True)
    backward(model, BATCHES[rank])
    gradients = {name: gradient.full_tensor() for name, gradient in gradients_of(model).items()}
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    destroy_process_group()


def gradients_of_two(folder: Path, **options: Any) -> dict[str, Tensor]:
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=one_of_two, args=(rank, folder), kwargs=options) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    return torch.load(folder / "gradients.pt")


def mean_gradients(**options: Any) -> dict[str, Tensor]:
    """Of one process that has the batches of both."""
    model = tiny_model(**options)
    for batch in BATCHES:
        backward(model, batch)
    return {name: gradient / len(BATCHES) for name, gradient in gradients_of(model).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("passes", [0, 1], ids=["first forward", "after a forward without gradient"])
def test_the_gradient_of_the_head_is_the_mean_over_processes(passes, adapter, tmp_path):
    found, wanted = gradients_of_two(tmp_path, passes=passes, adapter=adapter), mean_gradients(adapter=adapter)
    assert found.keys() == wanted.keys() and any("lm_head" in name for name in wanted)
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.distributed
def test_trl_still_gives_each_process_the_gradient_of_its_own_batch(tmp_path):
    """When this fails, `trl_vlm/trainers/fsdp.py` can be deleted."""
    found, wanted = gradients_of_two(tmp_path, is_reduced=False), mean_gradients()
    model = tiny_model()
    backward(model, BATCHES[0])
    own = gradients_of(model)["lm_head.weight"]
    assert_close(found["lm_head.weight"][:4], own[:4])  # the rows that the first process stores
    assert_close(found["model.norm.weight"], wanted["model.norm.weight"])
    with pytest.raises(AssertionError, match="lm_head"):
        assert_close(found["lm_head.weight"], wanted["lm_head.weight"], msg=lambda text: f"lm_head: {text}")
