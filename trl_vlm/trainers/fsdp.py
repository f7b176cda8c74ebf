"""What FSDP2 needs: one gradient for all processes, a whole model where each generates alone, and resuming."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp_utils
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.fsdp import FSDPModule

from trl_vlm.trainers.attributes import with_attributes
from trl_vlm.trainers.types import Model, base_model


def reduce_gradient_of_head(model: Model) -> None:
    """Lets FSDP2 average the gradient of the output head over the processes, as it does all others.

    TRL multiplies hidden states by `lm_head.weight` and never calls the head. In a model whose last norm accelerate
    does not find (a vision-language model, or one with adapters, without tied embeddings) the head is a unit of its
    own, so that FSDP2 does not gather it in such a forward. TRL then takes `weight.full_tensor()`, whose gradient
    counts as the same on all processes: each keeps the rows that it stores of the gradient of its own batch, and those
    of the others are lost. Gathered by FSDP2 before the forward, the head has a gradient that is reduced.

    https://github.com/huggingface/trl/pull/6077 brought the `full_tensor()`, and
    https://github.com/huggingface/accelerate/pull/4015 the unit. Delete when TRL reduces the gradient, which
    `tests/trainers/test_fsdp.py` notices.

    Args:
        model: What is trained, before it is sharded.
    """
    model.register_forward_pre_hook(_gather_head)


def _gather_head(model: nn.Module, _: object) -> None:
    assert isinstance(model, Model)
    head = base_model(model).get_output_embeddings()
    if not isinstance(head, FSDPModule) or not torch.is_grad_enabled():
        return
    assert isinstance(head, nn.Module)
    if any(parameter.requires_grad for parameter in head.parameters()):
        head.unshard()


@contextmanager
def loading_what_was_saved() -> Iterator[None]:
    """A context in which an optimizer's checkpoint may lack weights that never got a gradient, as on one process.

    LLaVA reads its tower below the last layer, so that layer trains and has no state; torch refuses such a checkpoint
    ("Missing optimizer state for parameter"), and accelerate has no public option for it. Delete when it has one;
    `test_precision_distributed.py` resumes such a run.
    """
    make = fsdp_utils._prepare_sd_options

    def lenient(plugin: FullyShardedDataParallelPlugin) -> StateDictOptions | None:
        options = make(plugin)
        return None if options is None else dataclasses.replace(options, strict=False)

    with with_attributes(fsdp_utils, _prepare_sd_options=lenient):
        yield


@contextmanager
def whole_on_each_process(model: nn.Module | None) -> Iterator[None]:
    """A context in which FSDP2 keeps all parameters on each process, so that a forward waits for no other process.

    All processes enter and leave it together.

    Args:
        model: As it was wrapped, if it was; without FSDP2 nothing happens.
    """
    modules = () if model is None else model.modules()
    units = [module for module in modules if isinstance(module, FSDPModule)]
    # What torch has no public names for: which unit is the root (the first that runs, and here the base of an adapter
    # may run alone), and whether a unit is divided again after a forward (accelerate keeps some of them).
    # Delete when torch has both; `test_pairs_distributed.py` notices if the names go.
    if units and isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()
    groups = [group for unit in units if (group := unit._get_fsdp_state()._fsdp_param_group) is not None]
    divided_to = [group.post_forward_mesh_info for group in groups]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
        for group, mesh in zip(groups, divided_to, strict=True):
            group.post_forward_mesh_info = mesh
