"""What `DPOTrainer` prepares that other trainers do not: its reference, its shared prefixes."""

from collections.abc import Callable
from typing import Protocol

from accelerate.utils import is_peft_model
from peft import PeftConfig
from torch import nn

from trl_vlm.models.prefix_sharing.sharing import why_not_shareable
from trl_vlm.trainers import preparation
from trl_vlm.trainers.dpo.config import DPOConfig


class DPOSetup(Protocol):
    """What decides on shared prefixes, of a trainer that TRL's constructor has made."""

    args: DPOConfig
    model: nn.Module
    compute_metrics: Callable[..., dict] | None
    aux_loss_enabled: bool


def why_no_shared_prefix(trainer: DPOSetup, models: list[nn.Module], own_collator: bool) -> str | None:
    """Why a `DPOTrainer` computes prompts once per reply, as one sentence; None if its models can share them."""
    args = trainer.args
    further = {
        "`compute_metrics` reads logits of whole sequences": trainer.compute_metrics is not None,
        "the auxiliary loss of mixtures of experts counts every token": trainer.aux_loss_enabled,
        "`keep_end` truncation gives the replies of a row different prompts": (
            args.truncation_mode == "keep_end" and args.max_length is not None
        ),
    }
    reason = preparation.why_no_shared_prefix(trainer.model, args, own_collator, further)
    return reason or next(filter(None, (why_not_shareable(model.config) for model in models)), None)


def refuse_unknown_reference(
    model: str | nn.Module, ref_model: nn.Module | None, peft_config: PeftConfig | None, args: DPOConfig
) -> None:
    """Stop where TRL would load the reference from the path of a model that was made in memory and has none.

    Raises:
        ValueError: The model has no path, and its reference is neither passed, nor its own base, nor computed before.
    """
    needs_path = ref_model is None and peft_config is None and not args.precompute_ref_log_probs
    if isinstance(model, str) or is_peft_model(model) or model.config._name_or_path or not needs_path:
        return
    raise ValueError(
        f"The model is a {type(model).__name__} that was made in memory, so its reference cannot be loaded. Pass "
        "`ref_model=copy.deepcopy(model)`, or save the model with its processor and pass the folder, or train an "
        "adapter (`peft_config`), whose base is the reference."
    )
