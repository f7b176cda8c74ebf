"""Whether a reward model behaves as its trainer and its reward function assume, on small images and rows."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trl_vlm.data.encoding import RewardCollator
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.doctor.findings import Finding, attempt, changed, equal
from trl_vlm.doctor.policy import PADDING, compared, filler_of
from trl_vlm.doctor.samples import FACTS, OTHER_FACTS, Batch, on_device, padded, rows
from trl_vlm.doctor.subject import Subject
from trl_vlm.models.prefix_sharing.sharing import always_sharing, share_pairs, why_pairs_not_shareable


def examine(subject: Subject) -> list[Finding]:
    """The checks of a reward model. Sharing comes last: it stays hooked into the model."""
    checks = {
        "scores follow images": images,
        "scores follow facts": facts,
        "scores tell replies apart": replies,
        "padding on the right": partial(padding, side="right"),
        "padding on the left": partial(padding, side="left"),
        "shared prompts": sharing,
    }
    return [attempt(name, partial(check, subject, name)) for name, check in checks.items()]


@torch.no_grad()
def images(subject: Subject, name: str) -> Finding:
    """Whether other images change scores."""
    difference = _scores(subject, _batch(subject)) - _scores(subject, _batch(subject, pictures=1))
    return changed(
        name, difference.abs().max().item(), "scores on other images", "the reward model is blind to its images"
    )


@torch.no_grad()
def facts(subject: Subject, name: str) -> Finding:
    """Whether other facts change scores."""
    template = subject.template
    if template is None or not template.use_facts:
        return Finding(name, "not possible", "the judge template shows no facts")
    difference = _scores(subject, _batch(subject)) - _scores(subject, _batch(subject, facts=OTHER_FACTS))
    return changed(
        name, difference.abs().max().item(), "scores with other facts", "the reward model does not read its facts"
    )


@torch.no_grad()
def replies(subject: Subject, name: str) -> Finding:
    """Whether two replies to a prompt have different scores."""
    chosen, rejected = _scores(subject, _batch(subject)).chunk(2)
    meaning = "the head is zero, or the score is read where the reply is not seen"
    return changed(name, (chosen - rejected).abs().max().item(), "scores between two replies", meaning)


@torch.no_grad()
def padding(subject: Subject, name: str, side: str) -> Finding:
    """Whether scores are the same with more padding."""
    batch = _batch(subject)
    found = _scores(subject, padded(batch, PADDING, side, filler_of(subject)))
    return equal(name, (found - _scores(subject, batch)).abs().mean().item(), subject.dtype, "scores")


def sharing(subject: Subject, name: str) -> Finding:
    """Whether a pair that shares its prompt gives the loss and the gradients of the plain path."""
    config = subject.inner.config
    reason = why_pairs_not_shareable(config)
    if reason is not None:
        return Finding(name, "not possible", reason)
    batch = _batch(subject)
    wanted = _loss_and_gradients(subject, batch)
    with always_sharing(subject.inner):
        found = _loss_and_gradients(subject, share_pairs(batch, config))
    return compared(name, found, wanted, subject)


def _batch(subject: Subject, *, pictures: int = 0, facts: tuple[str, ...] = FACTS) -> Batch:
    """The rows as the reward trainer's batch, without margins."""
    collate = RewardCollator(subject.trained_processor, subject.template or JudgeTemplate.none())
    batch = dict(collate(rows(pictures, facts)))
    batch.pop("margin")
    return on_device(batch, subject.model.device, subject.dtype)


def _scores(subject: Subject, batch: Batch) -> Tensor:
    """(2P,), in float32."""
    return subject.model(**batch).logits[:, 0].float()


def _loss_and_gradients(subject: Subject, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    with subject.watching() as watched:
        chosen, rejected = _scores(subject, batch).chunk(2)
        loss = -logsigmoid(chosen - rejected).mean()
        gradients = torch.autograd.grad(loss, watched, allow_unused=True)
    return loss.detach(), [torch.zeros(1) if one is None else one for one in gradients]
