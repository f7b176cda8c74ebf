"""Prefix sharing for untested families and kernels: it is verified on the first batch, or stays off."""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trl_vlm.models.generation import evaluating

logger = logging.getLogger(__name__)

# How far the hidden states of a reply's token may be apart, as a share of their norm. Rounding makes up to 1e-5 in
# float32 and a few percent in bfloat16; a wrong position or mask makes more, in the layers after it, or nothing.
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Errors of models that cannot read a packed batch at all.
_CANNOT_READ = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def plain_inputs(inputs: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A shared batch as it would be without sharing: with the images of its rows once for each sequence.

    Args:
        inputs: With `keys[0]`, (N, 2). With images, its sequences are all rows' first ones, then all rows' second
            ones, and so on; unless `keys[2]` holds the plain image inputs.
        keys: Those that only a shared batch has.
    """
    if keys[2] in inputs:
        return {name: value for name, value in inputs.items() if name not in keys} | inputs[keys[2]]
    rows, shape = inputs[keys[0]][:, 0], inputs["input_ids"].shape
    plain = {name: value for name, value in inputs.items() if name not in keys}
    per_image = [name for name, value in plain.items() if isinstance(value, Tensor) and value.shape != shape]
    if not per_image:
        return plain
    copies = len(rows) // (int(rows.max()) + 1)
    order = torch.arange(len(rows) // copies, device=rows.device).repeat(copies)
    if not torch.equal(rows, order):
        raise ValueError(f"The sequences of a shared batch belong to the rows {rows.tolist()}, not {order.tolist()}.")
    return plain | {name: torch.cat([plain[name]] * copies) for name in per_image}


def gives_the_same(backbone: PreTrainedModel, inputs: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """Computes a batch in both ways, and says (and logs) whether replies have the same hidden states in both.

    Equal hidden states give equal log-probabilities and scores, whatever the head. With several processes each
    computes its own batch, and all keep to the plain path if one of them found a difference: under ZeRO-3 and FSDP
    they must run the same layers, and under DDP they should train on the same numbers.
    """
    here = _gives_the_same_here(backbone, inputs, keys)
    everywhere = _on_all_processes(here, inputs[keys[0]].device)
    if here and not everywhere:
        _said(backbone, "another process found that replies after a common prompt come out differently")
    return everywhere


def _on_all_processes(verdict: bool, device: torch.device) -> bool:
    """Whether the verdict is true on each process; all of them come here with their first batch."""
    if not torch.distributed.is_initialized():
        return verdict
    agreed = torch.tensor(int(verdict), device=device)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN)
    return bool(agreed)


def _gives_the_same_here(backbone: PreTrainedModel, inputs: dict[str, Any], keys: tuple[str, ...]) -> bool:
    plain, first = plain_inputs(inputs, keys), inputs.get(keys[1], 0)
    # Caches are not needed, and dropout would draw another mask in each pass.
    with evaluating(backbone):
        wanted = backbone(**plain | {"use_cache": False}).last_hidden_state[:, first:].float()
        try:
            found = backbone(**inputs | {"use_cache": False}).last_hidden_state.float()
        except torch.OutOfMemoryError:
            raise
        except _CANNOT_READ as error:
            return _said(backbone, f"it cannot read replies after a common prompt ({type(error).__name__}: {error})")
    columns = torch.arange(plain["input_ids"].size(1), device=found.device)
    attended = plain["attention_mask"].to(found.device)
    replies = attended.int().argmax(1, keepdim=True) + inputs[keys[0]][:, 1:].to(found.device)  # their first columns
    is_reply = (columns >= replies) & attended.bool()
    distance = ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6))[is_reply[:, first:]]
    largest = distance.max().item() if len(distance) else 0.0
    if largest <= _TOLERANCES.get(backbone.dtype, 1e-1):
        logger.info("%s: shared prefixes give the same (largest error %.1e).", _name(backbone), largest)
        return True
    return _said(backbone, f"replies after a common prompt come out differently (by {largest:.1%})")


def _said(backbone: PreTrainedModel, reason: str) -> bool:
    logger.warning("%s: prompts are computed once per reply, not once per row: %s.", _name(backbone), reason)
    return False


def _name(backbone: PreTrainedModel) -> str:
    return backbone.config.model_type
