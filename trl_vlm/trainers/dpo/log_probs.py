"""An adapter around TRL's fused forward that changes the log-probabilities that the trainer reads.

TRL reads `log_probs` of the output of a fused forward. So the weights of Dense DPO and the shared prefix are applied
here, and TRL's losses and metrics are unchanged.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from trl_vlm.maths.segments import dense_score
from trl_vlm.models.prefix_sharing.sharing import FIRST_COLUMN, SHARED_PREFIX
from trl_vlm.trainers._trl import FusedCausalLMOutput
from trl_vlm.trainers.dpo.distortion import DISTORTED, DistortedReplies
from trl_vlm.trainers.dpo.segments import Segments

# The outputs of TRL's fused head per token.
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


@dataclass(frozen=True)
class DenseScore:
    """How Dense DPO scores a reply.

    per_token: The loss divides a reply's score by its number of tokens, so the mean is multiplied by it beforehand.
    """

    gamma: float
    reduction: str
    per_token: bool = False

    @property
    def per_reply(self) -> "DenseScore":
        """The score that no loss divides."""
        return replace(self, per_token=False)

    def apply(
        self,
        log_probs: Tensor,
        is_changed: Tensor,
        is_reply: Tensor,
        token_weights: Tensor | None = None,
        score_weights: Tensor | None = None,
    ) -> Tensor:
        """Adds `score - sum` to column 0 (a prompt position), so that each row sums to its score.

        TRL sums a row for its preference losses, but reads single reply tokens for `sft` and for the weights of WPO,
        which need the unweighted log-probabilities.

        Args:
            log_probs: (N, T), 0 outside the reply.
            is_changed: (N, T), bool.
            is_reply: (N, T), bool.
            token_weights: (N, T), see `dense_score`.
            score_weights: (N,), likewise.

        Returns:
            (N, T).
        """
        if is_reply[:, 0].any():
            row = int(is_reply[:, 0].nonzero()[0])
            raise ValueError(
                f"Sequence {row} of the batch has a prompt of one token; Dense DPO needs at least two. Add a system "
                "prompt or a question."
            )
        weights = {"token_weights": token_weights, "score_weights": score_weights}
        score = dense_score(log_probs, is_changed, is_reply, gamma=self.gamma, reduction=self.reduction, **weights)
        if self.per_token:
            score = score * is_reply.sum(1)
        first = log_probs[:, :1] + (score - log_probs.sum(1))[:, None]
        return torch.cat([first, log_probs[:, 1:]], dim=1)


class Scored(NamedTuple):
    """A batch of K replies to each of P rows after the forwards of policy and reference.

    Args:
        inputs: The batch.
        policy: Output of a fused forward, (K * P, T - 1) per token.
        reference: Log-probabilities, likewise; None where there is no reference, or TRL stores it.
        segments: What Dense DPO reads; None without.
        num_replies: K.
    """

    inputs: dict[str, Any]
    policy: Any
    reference: Tensor | None
    segments: Segments | None
    num_replies: int

    @property
    def rows(self) -> int:
        """P."""
        return len(self.inputs["input_ids"]) // self.num_replies


def sequences(
    output: FusedCausalLMOutput, place: Tensor, is_reply: Tensor, score: Callable[..., Tensor] | None = None
) -> FusedCausalLMOutput:
    """Some sequences of an earlier forward, in the form that TRL reads.

    Args:
        output: Of a fused forward.
        place: (N,), which sequences.
        is_reply: (N, T - 1), bool.
        score: `DenseScore.apply` for these sequences.
    """
    width = is_reply.size(1)  # prompt-learning adapters put virtual tokens before the others
    some = type(output)(**{name: output[name][place, -width:] for name in PER_TOKEN if name in output})
    some.aux_loss = output.aux_loss
    if score is not None:
        some.log_probs = score(some.log_probs, is_reply=is_reply)
    return some


def attach(model: PreTrainedModel, distortion: DistortedReplies | None) -> None:
    """Patches `model.forward` after TRL has: its log-probabilities stay (N, T - 1) with a shared prefix.

    Args:
        model: Policy or reference.
        distortion: Chooses the last replies' tokens (POVID); one for policy and reference.
    """
    fused = model.forward

    # The signature stays that of the class: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        noisy = kwargs.pop(DISTORTED, None)
        if not kwargs.get("fused_lm_head"):
            return fused(*args, **kwargs)
        if noisy is not None:
            assert distortion is not None  # else no collator puts noisy images into a batch
            kwargs["labels"] = distortion.labels(model, kwargs, noisy)
        return _beside_the_batch(_fused_on_shared_prefix(fused, args, kwargs), kwargs.get("labels"))

    model.forward = types.MethodType(forward, model)


def _beside_the_batch(output: Any, labels: Tensor | None) -> Any:
    """The output on the batch's device: for a model on several devices TRL leaves it on that of the head."""
    for name in PER_TOKEN:
        if labels is not None and name in output:
            output[name] = output[name].to(labels.device)
    return output


def _fused_on_shared_prefix(fused: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Columns before the first reply have no labels: no hidden state is copied there, nor read by the head."""
    if SHARED_PREFIX not in kwargs:
        return fused(*args, **kwargs)
    first = max(int(kwargs[SHARED_PREFIX][:, 1].min()) - 1, 0)
    output = fused(*args, **kwargs | {FIRST_COLUMN: first, "labels": kwargs["labels"][:, first:]})
    for name in PER_TOKEN:
        if name in output:
            output[name] = functional.pad(output[name], (first, 0))
    return output
