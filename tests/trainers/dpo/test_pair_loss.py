"""A loss that TRL lacks: a function of the scores of the replies, with a reference or without one."""

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText
from trl.trainer import dpo_trainer

from tests.families import saved
from tests.trainers.dpo.helpers import SHARED, largest_difference, logs, lora, losses, make, rows, text_rows
from tests.trainers.dpo.test_averaged import OTHER, THIRD, with_extra
from trl_vlm import DPOConfig, DPOTrainer

pytestmark = pytest.mark.slow

SHORT = {"max_steps": 3}
SIMPO = {"dense_gamma": 1.0, "dense_reduction": "mean", "reference_free": True}


def dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """TRL's `sigmoid` with its default beta, by hand."""
    return -logsigmoid(0.1 * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)))


def simpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=2.0, margin=0.5):
    assert reference_chosen is None and reference_rejected is None
    return -logsigmoid(beta * (policy_chosen - policy_rejected) - margin)


def trainer_of(tmp_path, loss=simpo, **options):
    return make(DPOTrainer, DPOConfig, tmp_path, pair_loss=loss, **SHORT | options)


@torch.no_grad()
def scores_of(trainer, batch, gamma):
    """(N,), the weighted mean of each reply's log-probabilities, from whole logits of a batch without sharing."""
    names = ("input_ids", "attention_mask", "pixel_values")
    logits = trainer.model(**{name: batch[name] for name in names}).logits[:, :-1].log_softmax(-1)
    log_probs = logits.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    weights = batch["completion_mask"][:, 1:].float()
    if gamma != 1.0:
        weights = weights * torch.where(batch["changed_tokens"][0], gamma, 1.0)
    return (log_probs * weights).sum(1) / weights.sum(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_prefix": False},
        {"peft_config": lora()},
        {"dense_preset": "release"},
        {"data": text_rows},
        {"data": lambda: with_extra(rows(), OTHER, THIRD), "rejected_weight": 0.6},
        {"povid_loss": "shared", "data": lambda: rows((1, 2, 1))},
    ],
    ids=["images", "unshared", "lora", "dense", "text", "several rejected", "povid"],
)
def test_dpo_written_as_a_pair_loss_trains_and_logs_as_trls_own(options, tmp_path):
    options = SHORT | {name: value() if callable(value) else value for name, value in options.items()}
    wanted = logs(make(DPOTrainer, DPOConfig, tmp_path, **options))
    found = logs(make(DPOTrainer, DPOConfig, tmp_path, pair_loss=dpo, **options))
    difference, metric = largest_difference(found, wanted)
    assert difference < 1e-6, metric


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_simpo_on_dense_scores_by_hand(gamma, tmp_path):
    options = SIMPO | {"dense_gamma": gamma, "data": rows((1, 2, 1)), "per_device_train_batch_size": 3}
    trainer = trainer_of(tmp_path, share_prefix=False, **options)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    chosen, rejected = scores_of(trainer, batch, gamma).chunk(2)
    margins = 2.0 * (chosen - rejected) - 0.5
    wanted = torch.log1p(torch.exp(-margins)).mean()
    found = trainer.compute_loss(trainer.model.eval(), dict(batch))
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"peft_config": lora()}, {"data": lambda: with_extra(rows(), OTHER, THIRD)}],
    ids=["full", "lora", "extra replies"],
)
def test_sharing_changes_no_reference_free_loss(options, tmp_path):
    options = SIMPO | {name: value() if callable(value) else value for name, value in options.items()}
    found, wanted = (logs(trainer_of(tmp_path, share_prefix=share, **options)) for share in (True, False))
    difference, metric = largest_difference(found, wanted)
    assert difference < SHARED, metric
    assert found[-1]["loss"] < found[0]["loss"]


def test_several_rejected_replies_are_a_weighted_mean_of_the_losses(tmp_path):
    def first(data, **options):
        return losses(trainer_of(tmp_path, data=data, max_steps=1, per_device_train_batch_size=4, **SIMPO, **options))[
            0
        ]

    one, two = first(rows()), first(rows().map(lambda _: {"rejected": OTHER}))
    assert abs(one - two) > 1e-3
    assert_close(first(with_extra(rows(), OTHER), rejected_weight=0.7), 0.7 * one + 0.3 * two, rtol=1e-5, atol=1e-6)


def test_a_reference_free_loss_loads_and_computes_no_reference(tmp_path, monkeypatch):
    loaded, passes, load = [], [], dpo_trainer.create_model_from_path
    monkeypatch.setattr(dpo_trainer, "create_model_from_path", lambda *a, **k: loaded.append(a) or load(*a, **k))
    trainer = trainer_of(tmp_path, **SIMPO)
    assert len(loaded) == 1 and trainer.ref_model is None
    trainer.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    entries = logs(trainer)
    assert len(passes) == len(entries) == 3
    # Without a reference a reply's reward is beta times its score.
    assert entries[0]["rewards/chosen"] == pytest.approx(0.1 * entries[0]["logps/chosen"], rel=1e-5)


def test_a_reference_free_loss_keeps_no_copy_of_a_given_adapter(tmp_path):
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(saved("llava", sharp=4.0)), lora())
    trainer = trainer_of(tmp_path, model=model, **SIMPO)
    assert list(trainer.model.peft_config) == ["default"]
    assert len(losses(trainer)) == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss": None, "reference_free": True}, "no reference is read, and TRL's losses all read one"),
        ({"loss_type": ["ipo"], "ld_alpha": 0.5}, "`loss_type`, `ld_alpha` cannot be combined with `pair_loss`"),
        ({"reference_free": True, "reference_cache": "cache"}, "`reference_cache` cannot be combined with"),
        (
            {"reference_free": True, "sync_ref_model": True},
            "`sync_ref_model` cannot be combined with `reference_free`",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        trainer_of(tmp_path, **options)


def test_a_reference_that_is_passed_and_not_read_is_refused(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(saved("llava", sharp=4.0))
    with pytest.raises(ValueError, match="no reference is read, and a `ref_model` was passed"):
        trainer_of(tmp_path, ref_model=model, **SIMPO)


def test_a_loss_that_is_reduced_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`pair_loss` returned \(\) for 2 pairs. It must return .* \(2,\)"):
        trainer_of(tmp_path, lambda *scores: dpo(*scores).mean()).train()
