"""The image side of preference in the loss: one more pair, of one reply under two images, and the anchor.

    D(y | m) = log pi(y | m, x) - log pi_ref(y | m, x)
    L(y+, y- | m) + w_i L( (y+ | m), (y+ | m~) ) + w_a * -log sigmoid( beta D(y+ | m) - delta )

L is TRL's loss, or `pair_loss`, for all of its pairs; m~ is the corrupted image. With `image_inside` the image pair's
difference stands beside the other one inside L: D(y+ | m) - D(y- | m) + w_i [ D(y+ | m) - D(y+ | m~) ].

Source: mDPO (arXiv:2406.11839), CHiP (arXiv:2501.16629), OPA-DPO (arXiv:2501.09695).
Differs: docs/methods/image_preference.md says in what from each.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trl_vlm.maths.losses import anchor_loss
from trl_vlm.models.masked_images import masked_inputs
from trl_vlm.trainers import _trl
from trl_vlm.trainers.attributes import with_attributes
from trl_vlm.trainers.dpo.image_collator import HIDDEN
from trl_vlm.trainers.dpo.log_probs import PER_TOKEN, Scored, sequences
from trl_vlm.trainers.dpo.metrics import image_metrics
from trl_vlm.trainers.types import gathered

if TYPE_CHECKING:
    from trl_vlm.trainers.dpo.trainer import DPOTrainer


class ImagePair(NamedTuple):
    """The chosen replies under both images, (2P, T - 1): P under their own, then P under the corrupted ones.

    Args:
        inputs: What TRL reads of the batch.
        policy: In the form of a fused forward's output.
        reference: Log-probabilities; None without a reference.
        segments: Arguments of `DenseScore.apply`, or None.
    """

    inputs: dict[str, Any]
    policy: Any
    reference: Tensor | None
    segments: dict[str, Tensor | None] | None


class InsideScores(NamedTuple):
    """What is added to the scores of P chosen replies and of P rejected ones, (2P,), inside one loss."""

    policy: Tensor | None = None
    reference: Tensor | None = None


NOTHING_INSIDE = InsideScores()


def with_scores(output: Any, added: Tensor | None) -> Any:
    """An output whose rows sum to `added` more: it stands in column 0, a prompt position, as Dense DPO's scores do."""
    if added is not None:
        first = output.log_probs[:, :1] + added[:, None].to(output.log_probs.dtype)
        output.log_probs = torch.cat([first, output.log_probs[:, 1:]], dim=1)
    return output


class ImagePreference:
    """The image pair and the anchor of a `DPOTrainer`.

    Args:
        trainer: Whose models, losses and metrics they are.
    """

    def __init__(self, trainer: "DPOTrainer"):
        self.trainer, self.args = trainer, trainer.args
        self.weight, self.is_inside = trainer.args.image_weight or 0.0, trainer.args.image_inside

    def total(self, pairs: Callable[..., Tensor], batch: Scored, image: ImagePair | None) -> Tensor:
        """The loss of the pairs of replies, with the terms of the image pair and of the anchor.

        Args:
            pairs: The mean loss of the pairs of replies, given what is to be added to their scores.
            batch: After the forwards.
            image: The image pair, if there is one.
        """
        if image is not None and self.weight and self.is_inside:
            with torch.no_grad():
                pairs()  # TRL's metrics are those of the replies
            with own_metrics(self.trainer):
                loss = pairs(self._inside(image))
        else:
            loss = pairs()
            if image is not None and self.weight:
                loss = loss + self._loss(image)
        if image is not None:
            self._log_image(image)
        return loss + self._anchor(batch) if self.args.anchor_weight else loss

    def pair(self, model: Any, corrupted: dict[str, Any], batch: Scored) -> ImagePair:
        """The image pair of a batch, from one more forward of the policy and, unless it is cached, of the reference.

        Args:
            model: As TRL calls it.
            corrupted: See `IMAGE_PAIR`.
            batch: After the forwards; more rows of its reference at the end are those under the corrupted images.
        """
        inputs, reference, trainer = batch.inputs, batch.reference, self.trainer
        arguments = self._arguments(corrupted)
        is_reply, mask = inputs["completion_mask"][: batch.rows, 1:].bool(), corrupted["completion_mask"][:, 1:].bool()
        if self.weight:
            output = model(**arguments)
        else:
            with torch.no_grad(), _kept_draws(arguments["input_ids"].device):
                output = model(**arguments)
        joined = type(output)()
        for name in PER_TOKEN:
            if name in output:
                joined[name] = _joined(batch.policy[name], output[name], is_reply, mask)
        if reference is not None and len(reference) > len(inputs["input_ids"]):
            reference = torch.cat([reference[: batch.rows], reference[-batch.rows :]])
        elif reference is not None:
            corrupted_reference = trainer._reference_log_probs(trainer.ref_model or trainer.model, arguments)
            reference = _joined(reference, corrupted_reference, is_reply, mask)
        chosen = {key: inputs[key][: batch.rows].repeat(2, 1) for key in ("input_ids", "completion_mask")}
        # TRL uses it only to count tokens, and these are counted already.
        chosen["attention_mask"] = torch.zeros_like(chosen["input_ids"])
        return ImagePair(chosen, joined, reference, None if batch.segments is None else batch.segments.of_chosen())

    def reference_under_corrupted(self, model: Any, corrupted: dict[str, Any], inputs: dict[str, Any]) -> Tensor:
        """(P, T - 1), the reference's log-probabilities in the places of the chosen replies, for the cache."""
        rows = len(corrupted["input_ids"])
        is_reply, mask = inputs["completion_mask"][:rows, 1:].bool(), corrupted["completion_mask"][:, 1:].bool()
        return _aligned(self.trainer._reference_log_probs(model, self._arguments(corrupted)), is_reply, mask)

    def _arguments(self, corrupted: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a fused forward, with image tokens hidden."""
        inputs = dict(corrupted)
        hidden = inputs.pop(HIDDEN, None)
        if hidden is not None:
            inputs = masked_inputs(self.trainer._base_model, inputs, hidden)
        return self.trainer._model_arguments(inputs)

    def _inside(self, pair: ImagePair) -> InsideScores:
        """The image pair's scores, times its weight, to be added to those of the replies."""
        scores, reference = self._scores(pair)
        return InsideScores(self.weight * scores, None if reference is None else self.weight * reference)

    def _loss(self, pair: ImagePair) -> Tensor:
        """The weighted loss of the image pair, by TRL's losses of two replies."""
        trainer = self.trainer
        preferences = [(kind, weight) for kind, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True)]
        preferences = [(kind, weight) for kind, weight in preferences if kind != "sft"]  # it reads one reply
        kinds, weights = zip(*preferences, strict=True)
        place = torch.arange(len(pair.inputs["input_ids"]))
        # The reference is read from the batch, as for the pairs of replies.
        read = {"loss_types": [*kinds], "loss_weights": [*weights], "precompute_ref_logps": True}
        with own_metrics(trainer), with_attributes(trainer, **read):
            loss = trainer._loss_of(pair.inputs, pair.policy, pair.reference, place, pair.segments)
        self._log({"image/loss": loss.detach()})
        return self.weight * loss

    def _log_image(self, pair: ImagePair) -> None:
        """Logs how much likelier the chosen replies are under their own images."""
        with torch.no_grad():
            scores, reference = self._scores(pair)
            log_ratios = scores if reference is None else scores - reference
            tokens = pair.inputs["completion_mask"].sum(1).chunk(2)[0]
            sums = pair.policy.log_probs.sum(1).chunk(2)
            self._log(image_metrics(log_ratios, sums, tokens, self.trainer.beta))

    def _anchor(self, batch: Scored) -> Tensor:
        """The weighted anchor of the chosen replies."""
        assert batch.reference is not None  # refused without
        place, segments = torch.arange(batch.rows), None
        if batch.segments is not None:
            segments = {
                name: None if value is None else value[: batch.rows]
                for name, value in batch.segments.of_pair(0).items()
            }
        is_reply = batch.inputs["completion_mask"][: batch.rows, 1:].bool()
        reference = _trl.FusedCausalLMOutput(log_probs=batch.reference.to(batch.policy.log_probs.device))
        scores, of_reference = (self._score(output, place, is_reply, segments) for output in (batch.policy, reference))
        loss = anchor_loss(scores - of_reference, beta=self.trainer.beta, value=self.args.anchor_value).mean()
        self._log({"anchor/loss": loss.detach()})
        return (self.args.anchor_weight or 0.0) * loss

    def _scores(self, pair: ImagePair) -> tuple[Tensor, Tensor | None]:
        """(2P,) of the policy, and of the reference."""
        place, is_reply = torch.arange(len(pair.inputs["input_ids"])), pair.inputs["completion_mask"][:, 1:].bool()
        scores = self._score(pair.policy, place, is_reply, pair.segments)
        if pair.reference is None:
            return scores, None
        reference = _trl.FusedCausalLMOutput(log_probs=pair.reference.to(scores.device))
        return scores, self._score(reference, place, is_reply, pair.segments)

    def _score(
        self, output: Any, place: Tensor, is_reply: Tensor, segments: dict[str, Tensor | None] | None
    ) -> Tensor:
        """The scores of some sequences, which losses that count tokens would still divide by their number."""
        dense = self.trainer._dense
        apply = None if segments is None or dense is None else functools.partial(dense.per_reply.apply, **segments)
        scored = sequences(output, place, is_reply, apply)
        assert scored.log_probs is not None  # of a fused forward
        return scored.log_probs.sum(1)

    def _log(self, measured: dict[str, Tensor]) -> None:
        metrics = self.trainer._metrics["train" if self.trainer.model.training else "eval"]
        for name, value in measured.items():
            metrics[name].append(gathered(self.trainer.accelerator, value.float().reshape(-1)).mean().item())


@contextlib.contextmanager
def own_metrics(trainer: "DPOTrainer") -> Iterator[None]:
    """A context in which TRL's metrics and counts of tokens go nowhere."""
    metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
    with with_attributes(trainer, _metrics=metrics, _total_train_tokens=trainer._total_train_tokens):
        yield


@contextlib.contextmanager
def _kept_draws(device: torch.device) -> Iterator[None]:
    """A context after which the random numbers of dropout go on as if it had not been."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_kind(device)):
        yield


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def _aligned(values: Tensor, is_reply: Tensor, mask: Tensor) -> Tensor:
    """Values of reply tokens, (P, any) at `mask` (P, T'), in the places `is_reply` (P, T); 0 elsewhere."""
    taken = values[:, -mask.size(1) :][mask]
    return taken.new_zeros(is_reply.shape).masked_scatter(is_reply, taken)


def _joined(batch: Tensor, corrupted: Tensor, is_reply: Tensor, mask: Tensor) -> Tensor:
    """(2P, T): the chosen replies of a batch, and the same under the corrupted images."""
    chosen = batch[: len(is_reply), -is_reply.size(1) :]
    return torch.cat([chosen, _aligned(corrupted.to(chosen.device), is_reply, mask)])
