"""Whether a generative model behaves as the trainers and pair sources assume, on small images and rows."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trl_vlm.data.encoding import encode
from trl_vlm.data.rows import row_images
from trl_vlm.doctor.findings import Finding, attempt, changed, equal
from trl_vlm.doctor.key_mask import hidden_keys
from trl_vlm.doctor.samples import Batch, on_device, padded, preference_batch, rows
from trl_vlm.doctor.subject import Subject
from trl_vlm.models.image_tokens import image_token_mask
from trl_vlm.models.masked_images import draw_hidden, masked_inputs
from trl_vlm.models.prefix_sharing.sharing import always_sharing, why_not_shareable

PADDING = 7  # columns
_MASK = "completion_mask"
_HIDDEN = 0.5  # of the image tokens


def examine(subject: Subject) -> list[Finding]:
    """The checks of a policy. Sharing comes last: it stays hooked into the model."""
    checks = {
        "pixels matter": pixels,
        "padding on the right": partial(padding, side="right"),
        "padding on the left": partial(padding, side="left"),
        "masked image tokens": masking,
        "shared prompts": sharing,
    }
    return [attempt(name, partial(check, subject, name)) for name, check in checks.items()]


@torch.no_grad()
def pixels(subject: Subject, name: str) -> Finding:
    """Whether other images change the log-probabilities of replies."""
    here, there = (_reply_log_probs(subject, _batch(subject, pictures=pictures))[0] for pictures in (0, 1))
    meaning = "the model is blind to its images, or the processor loses them"
    return changed(name, _largest(here - there), "log-probabilities of replies on other images", meaning)


@torch.no_grad()
def padding(subject: Subject, name: str, side: str) -> Finding:
    """Whether log-probabilities of replies are the same with more padding."""
    batch = _batch(subject)
    wanted, is_reply = _reply_log_probs(subject, batch)
    found, is_found = _reply_log_probs(subject, padded(batch, PADDING, side, filler_of(subject)))
    difference = (found[is_found] - wanted[is_reply]).abs().mean().item()
    return equal(name, difference, subject.dtype, "log-probabilities of replies")


@torch.no_grad()
def masking(subject: Subject, name: str) -> Finding:
    """Whether BDHS's way to hide image tokens is that of a mask inside the attention."""
    batch, config = _prompts(subject), subject.model.config
    generators = [torch.Generator().manual_seed(row) for row in range(len(batch["input_ids"]))]
    hidden = draw_hidden(batch["input_ids"], config, _HIDDEN, generators)
    found = _next_log_probs(subject, masked_inputs(subject.inner, batch, hidden))
    with hidden_keys(subject.inner, hidden):
        wanted = _next_log_probs(subject, batch)
    is_text = _behind_images(batch, subject)[:, 1:]
    return equal(name, _mean(found - wanted, is_text), subject.dtype, "log-probabilities of the text behind the image")


def sharing(subject: Subject, name: str) -> Finding:
    """Whether a prompt that is computed once for two replies gives the losses and gradients of the plain path."""
    reason = why_not_shareable(subject.inner.config)
    if reason is not None:
        return Finding(name, "not possible", reason)
    wanted_loss, wanted = _loss_and_gradients(subject, _batch(subject))
    with always_sharing(subject.inner):
        loss, found = _loss_and_gradients(subject, _batch(subject, shares_prefix=True))
    return compared(name, (loss, found), (wanted_loss, wanted), subject)


def compared(
    name: str, found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]], subject: Subject
) -> Finding:
    """The finding of two losses and their gradients, by the larger of both distances."""
    squares = sum((one - other).float().square().sum() for one, other in zip(found[1], wanted[1], strict=True))
    size = sum(other.float().square().sum() for other in wanted[1])
    gradients = float(squares / size) ** 0.5
    losses = abs(float(found[0] - wanted[0]))
    what = f"losses (by {losses:.1e}) and gradients (by {gradients:.1e} of their norm)"
    return equal(name, max(losses, gradients), subject.dtype, what)


def filler_of(subject: Subject) -> int:
    """The token of padding, which is no image token."""
    token = subject.processor.tokenizer.pad_token_id
    return 0 if token is None else token


def _batch(subject: Subject, **options: Any) -> Batch:
    batch = preference_batch(subject.trained_processor, **options)
    return on_device(batch, subject.model.device, subject.dtype)


def _prompts(subject: Subject) -> Batch:
    """The prompts of the rows, padded on the right."""
    sample = rows()
    images = [row_images(row, "a sample") for row in sample]
    batch = encode(subject.processor, [row["prompt"] for row in sample], images, add_generation_prompt=True)
    return on_device(batch, subject.model.device, subject.dtype)


def _loss_and_gradients(subject: Subject, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """A loss that tells all tokens of replies apart, and its gradients."""
    with subject.watching() as watched:
        log_probs, is_reply = _reply_log_probs(subject, batch)
        weights = torch.linspace(-1, 1, int(is_reply.sum()), device=log_probs.device)
        loss = (log_probs[is_reply] * weights).mean()
        gradients = torch.autograd.grad(loss, watched, allow_unused=True)
    return loss.detach(), [torch.zeros(1) if one is None else one for one in gradients]


def _reply_log_probs(subject: Subject, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(N, T - 1) log-probabilities, 0 outside the replies, and which of them belong to replies."""
    is_reply = batch[_MASK][:, 1:].bool()
    log_probs = _next_log_probs(subject, {name: value for name, value in batch.items() if name != _MASK})
    return log_probs * is_reply, is_reply


def _next_log_probs(subject: Subject, batch: Mapping[str, Any]) -> Tensor:
    """(N, T - 1), in float32: of backbone and head, as trainers call them (no scaling or capping of logits)."""
    head = subject.inner.get_output_embeddings()
    assert head is not None  # a generative model has one
    logits = head(subject.inner.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]).float()
    tokens = batch["input_ids"][:, 1:].to(logits.device)
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def _behind_images(batch: Batch, subject: Subject) -> Tensor:
    """(B, T): the text behind the last image token of a row."""
    is_image = image_token_mask(batch["input_ids"], subject.model.config).int()
    is_behind = is_image.flip(1).cumsum(1).flip(1) == 0
    return is_behind & batch["attention_mask"].bool()


def _largest(differences: Tensor) -> float:
    return differences.abs().max().item()


def _mean(differences: Tensor, where: Tensor) -> float:
    return differences[where.to(differences.device)].abs().mean().item()
