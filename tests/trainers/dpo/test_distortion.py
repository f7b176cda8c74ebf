"""POVID in the loss: the likeliest tokens under a noisy image, scored with the clean one."""

import copy
import math

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from tests.families import saved
from tests.trainers.dpo.helpers import begin_epoch, lora, losses, make, rows, text_rows
from tests.trainers.dpo.sources import Greedy
from tests.trainers.dpo.test_averaged import OTHER, with_extra
from tests.trainers.dpo.test_pair_sources import instructions
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.trainers.dpo.collator import NUM_REPLIES
from trl_vlm.trainers.dpo.distortion import DISTORTED

SHORT = {"max_steps": 3, "per_device_train_batch_size": 3}
IMAGES = (1, 2, 1)


def povid(tmp_path, **options):
    options = {"data": rows(IMAGES), "povid_loss": "published", **SHORT} | options
    return make(DPOTrainer, DPOConfig, tmp_path, **options)


def batch_of(trainer):
    return trainer.data_collator([dict(row) for row in trainer.train_dataset])


@torch.no_grad()
def log_probs(model, batch):
    """(N, T - 1, V), of whole logits."""
    inputs = {name: value for name, value in batch.items() if name not in ("completion_mask", DISTORTED, NUM_REPLIES)}
    return model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)


def loss_by_definition(policy, reference, batch, kind, beta=0.1):
    """Half DPO against the row's rejected reply and half against the distorted one, from whole logits.

    Args:
        batch: without sharing: chosen, rejected and once more the chosen replies, with their pixels.
    """
    count = batch[DISTORTED]["rows"]
    noisy = {name: value[: len(value) // 3] for name, value in batch.items() if name not in (DISTORTED, NUM_REPLIES)}
    noisy["pixel_values"] = batch[DISTORTED]["pixel_values"]
    likeliest = {model: log_probs(model, noisy).argmax(-1) for model in (policy, reference)}
    scores = []
    for model in (policy, reference):
        tokens = batch["input_ids"][:, 1:].clone()
        tokens[2 * count :] = likeliest[policy if kind == "shared" else model]
        each = log_probs(model, batch).gather(2, tokens[..., None])[..., 0]
        scores.append((each * batch["completion_mask"][:, 1:]).sum(1))
    chosen, rejected, distorted = (scores[0] - scores[1]).view(3, count)
    losses = logsigmoid(beta * (chosen - rejected)) + logsigmoid(beta * (chosen - distorted))
    return -losses.mean().item() / 2


@pytest.mark.parametrize(
    ("family", "kind", "share"),
    [
        ("llava", "published", True),
        ("llava", "published", False),
        ("llava", "shared", True),
        ("qwen2_5_vl", "published", True),
        ("gemma3", "published", True),
        ("paligemma", "published", True),
        ("idefics3", "shared", False),
    ],
)
def test_the_loss_is_that_of_a_slow_computation_on_whole_logits(family, kind, share, tmp_path):
    # The reference is another model, so that its tokens are others.
    other = AutoModelForImageTextToText.from_pretrained(saved(family, seed=1, sharp=4.0)).eval()
    options = {"family": family, "povid_loss": kind}
    trainer = povid(tmp_path, ref_model=copy.deepcopy(other), share_prefix=share, **options)
    trainer.model.eval()
    found = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    batch = batch_of(povid(tmp_path, ref_model=copy.deepcopy(other), share_prefix=False, **options))
    policy = AutoModelForImageTextToText.from_pretrained(saved(family, sharp=4.0)).eval()
    assert found == pytest.approx(loss_by_definition(policy, other, batch, kind), rel=1e-4)
    if family == "paligemma":
        return  # the two models happen to choose the same tokens
    wrong = loss_by_definition(policy, other, batch, "shared" if kind == "published" else "published")
    assert abs(found - wrong) > 1e-3


def test_without_noise_the_rejected_tokens_are_the_likeliest_ones(tmp_path):
    trainer = povid(tmp_path, noise_steps=0, share_prefix=False)
    trainer.model.eval()
    batch = batch_of(trainer)
    assert torch.equal(batch[DISTORTED]["pixel_values"], batch["pixel_values"][: len(batch["pixel_values"]) // 3])
    scores = []
    for model in (trainer.model, trainer.ref_model):
        fused = model.forward
        model.forward = lambda *args, fused=fused, **kwargs: scores.append(fused(*args, **kwargs)) or scores[-1]
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    is_reply = batch["completion_mask"][:3, 1:]
    largest = log_probs(trainer.ref_model, batch)[:3].amax(-1) * is_reply
    for scored in scores[:2]:  # policy and reference
        assert_close(scored.log_probs[6:].detach(), largest, rtol=1e-4, atol=1e-5)


def test_noise_is_new_in_each_epoch_and_the_same_for_the_same_seed(tmp_path):
    def noisy(epoch, **options):
        trainer = povid(tmp_path, **options)
        for _ in range(epoch + 1):
            begin_epoch(trainer)
        return batch_of(trainer)[DISTORTED]["pixel_values"]

    assert torch.equal(noisy(0), noisy(0))
    assert not torch.equal(noisy(0), noisy(1)) and not torch.equal(noisy(0), noisy(0, seed=1))
    assert losses(povid(tmp_path)) == losses(povid(tmp_path))


@pytest.mark.parametrize("kind", ["published", "shared"])
def test_lora_trains_and_the_first_loss_is_that_of_equal_models(kind, tmp_path):
    found = losses(povid(tmp_path, peft_config=lora(), povid_loss=kind, gradient_checkpointing=True))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and found[-1] < found[0] - 0.01


def test_with_all_the_weight_on_the_rows_own_reply_it_is_plain_dpo(tmp_path):
    plain = losses(make(DPOTrainer, DPOConfig, tmp_path, data=rows(IMAGES), **SHORT))
    assert_close(losses(povid(tmp_path, rejected_weight=1.0)), plain, rtol=1e-5, atol=1e-6)


def test_further_rejected_replies_share_the_rest_of_the_weight_with_it(tmp_path):
    other = AutoModelForImageTextToText.from_pretrained(saved("llava", seed=1, sharp=4.0))

    def loss(data, **options):
        trainer = povid(tmp_path, data=data, ref_model=copy.deepcopy(other), **options)
        trainer.model.eval()
        return trainer.compute_loss(trainer.model, batch_of(trainer)).item()

    own, distorted = (loss(rows(IMAGES), rejected_weight=weight) for weight in (1.0, 0.0))
    extra = loss(rows(IMAGES).map(lambda _: {"rejected": OTHER}), rejected_weight=1.0)
    found = loss(with_extra(rows(IMAGES), OTHER), rejected_weight=0.6)
    assert found == pytest.approx(0.6 * own + 0.2 * extra + 0.2 * distorted, rel=1e-5)


def test_it_goes_with_a_source_of_pairs_and_with_evaluation(tmp_path):
    trainer = povid(tmp_path, data=instructions(IMAGES), pair_source=Greedy(), eval_dataset=rows(IMAGES))
    assert len(losses(trainer)) == 3
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"povid_loss": "noisy"}, "`povid_loss` is 'noisy'; it must be 'published' or 'shared'"),
        ({"noise_steps": 1000}, "1000 steps of noise are out of range"),
        ({"noise_overflow": "cut"}, "`overflow` is 'cut'"),
        (
            {"dense_preset": "paper"},
            "Dense DPO cannot be combined with `povid_loss`: the rejected tokens are not known",
        ),
        ({"reference_cache": "cache"}, "`reference_cache` cannot be combined with `povid_loss`: the noise is new"),
        ({"data": text_rows}, "`povid_loss` puts noise on images, and the rows have no column `images`"),
    ],
)
def test_what_does_not_go_with_it_says_why(options, reason, tmp_path):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=reason):
        povid(tmp_path, **options)


def test_a_row_without_an_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="train row 1: it has no image, and"):
        povid(tmp_path, data=rows((1, 0, 1))).train()
