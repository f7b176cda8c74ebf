"""An adapter around TRL's fused forward: what a trainer reads as log-probabilities of replies.

TRL hands every extra batch key to the model, policy and reference alike, and reads `log_probs` off its output. So the
weights of Dense DPO and the shared prefix live here, and TRL's losses and metrics stay as they are.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from trl_vlm.maths.segments import dense_score
from trl_vlm.models.prefix_sharing.sharing import FIRST_COLUMN, SHARED_PREFIX
from trl_vlm.trainers.dpo.distortion import DISTORTED, DistortedReplies

CHANGED = "changed_tokens"
# What TRL's fused head returns per token.
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


@dataclass(frozen=True)
class DenseScore:
    """How Dense DPO scores a reply.

    per_token: the loss divides a reply's score by its number of tokens, so the mean comes multiplied by it.
    """

    gamma: float
    reduction: str
    per_token: bool = False

    def apply(self, log_probs: Tensor, is_changed: Tensor, is_reply: Tensor) -> Tensor:
        """Log-probabilities whose sum over a row is the row's score, and which are as they were inside the reply.

        TRL sums a row for its preference losses, and reads single reply tokens for `sft` and for the weights of WPO,
        which are about the policy and not about the correction. So the difference goes to the first column, which
        belongs to the prompt.

        Args:
            log_probs: (N, T), 0 outside the reply.
            is_changed: (N, T), bool.
            is_reply: (N, T), bool.

        Returns:
            (N, T).
        """
        if is_reply[:, 0].any():
            row = int(is_reply[:, 0].nonzero()[0])
            raise ValueError(
                f"Sequence {row} of the batch has a prompt of one token; Dense DPO needs at least two. Add a system "
                "prompt or a question."
            )
        score = dense_score(log_probs, is_changed, is_reply, gamma=self.gamma, reduction=self.reduction)
        if self.per_token:
            score = score * is_reply.sum(1)
        first = log_probs[:, :1] + (score - log_probs.sum(1))[:, None]
        return torch.cat([first, log_probs[:, 1:]], dim=1)


class ReplyLogProbs:
    """Takes our batch keys out of a forward, and gives log-probabilities as TRL expects them, (N, T - 1).

    One object serves policy and reference; `calls` holds what each forward since the last `clear` gave, unweighted
    and without gradient.
    """

    def __init__(self, dense: DenseScore | None, distortion: DistortedReplies | None = None):
        self.dense, self.distortion = dense, distortion
        self.calls: list[Tensor] = []

    def attach(self, model: PreTrainedModel) -> None:
        """Patch `model.forward`, after TRL has done so."""
        fused = model.forward

        # The signature stays that of the class: `generate` checks its arguments against it.
        @functools.wraps(type(model).forward)
        def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            return self._forward(model, fused, args, kwargs)

        model.forward = types.MethodType(forward, model)

    def _forward(self, model: PreTrainedModel, fused: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        is_changed, noisy = kwargs.pop(CHANGED, None), kwargs.pop(DISTORTED, None)
        if not kwargs.get("fused_lm_head"):
            return fused(*args, **kwargs)
        if noisy is not None:
            kwargs["labels"] = self.distortion.labels(model, kwargs, noisy, is_policy=not self.calls)
        labels, first = kwargs["labels"], 0
        if SHARED_PREFIX in kwargs:
            # Columns before the first reply have no labels: no hidden state is copied there, nor read by the head.
            first = max(int(kwargs[SHARED_PREFIX][:, 1].min()) - 1, 0)
            kwargs |= {FIRST_COLUMN: first, "labels": labels[:, first:]}
        output = fused(*args, **kwargs)
        for name in PER_TOKEN:
            if first and name in output:
                output[name] = functional.pad(output[name], (first, 0))
        self.calls.append(output.log_probs.detach())
        if is_changed is not None:
            output.log_probs = self.dense.apply(output.log_probs, is_changed, labels[:, 1:] != -100)
        return output
