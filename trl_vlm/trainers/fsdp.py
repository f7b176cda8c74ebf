"""What FSDP2 needs for the gradients of one process."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

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
