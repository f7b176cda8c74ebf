"""Dense DPO: the weights reach TRL's losses, for policy and reference alike."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.preference_rows import preference_row
from tests.trainers.dpo.helpers import SHARED, largest_difference, logs, lora, losses, make, rows
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.maths.changed_tokens import changed_tokens
from trl_vlm.trainers.dpo.log_probs import DenseScore

SHORT = {"max_steps": 3}


def dense_loss_by_definition(trainer, batch, gamma, beta, score):
    """The formula of RLHF-V, one reply and one token at a time, from log-softmax over whole logits."""
    scores = []
    for model in (trainer.model, trainer.ref_model):
        inputs = {name: value for name, value in batch.items() if name not in ("completion_mask", "changed_tokens")}
        with torch.no_grad():
            logits = model(**inputs).logits.float().log_softmax(-1)
        row_scores = []
        for row in range(len(logits)):
            reply = batch["completion_mask"][row].nonzero().flatten().tolist()
            other_row = (row + len(logits) // 2) % len(logits)
            ids = batch["input_ids"][row, reply].tolist()
            other = batch["input_ids"][other_row][batch["completion_mask"][other_row].bool()].tolist()
            chosen, rejected = (ids, other) if row < len(logits) // 2 else (other, ids)
            found = changed_tokens(chosen, rejected)
            is_changed = found.chosen if row < len(logits) // 2 else found.rejected
            weights = [gamma if changed else 1.0 for changed in is_changed]
            total = sum(
                weight * logits[row, place - 1, token].item()
                for weight, place, token in zip(weights, reply, ids, strict=True)
            )
            row_scores.append(total / sum(weights) if score == "mean" else total)
        scores.append(torch.tensor(row_scores))
    chosen, rejected = (scores[0] - scores[1]).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


@pytest.mark.parametrize(
    ("preset", "gamma", "beta", "score"), [("paper", 5.0, 0.5, "mean"), ("release", 1.1, 0.1, "sum")]
)
def test_the_loss_of_a_preset_is_the_formula_written_out(preset, gamma, beta, score, tmp_path):
    trainer = make(DPOTrainer, DPOConfig, tmp_path, dense_preset=preset, share_prefix=False)
    with torch.no_grad():  # away from the reference
        for parameter in trainer.model.model.language_model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    batch = trainer.data_collator([preference_row(seed, 1) for seed in range(3)])
    wanted = dense_loss_by_definition(trainer, batch, gamma, beta, score)
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
    assert abs(wanted - math.log(2)) > 1e-3
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_sharing_prefixes_changes_no_dense_loss(preset, tmp_path):
    found, wanted = (
        logs(make(DPOTrainer, DPOConfig, tmp_path, dense_preset=preset, share_prefix=share)) for share in (True, False)
    )
    difference, metric = largest_difference(found, wanted)
    assert difference < SHARED, metric
    assert math.isclose(found[0]["loss"], math.log(2), abs_tol=1e-6)


def test_gamma_one_with_the_sum_is_exactly_dpo(tmp_path):
    plain = losses(make(DPOTrainer, DPOConfig, tmp_path, **SHORT))
    dense = losses(make(DPOTrainer, DPOConfig, tmp_path, dense_gamma=1.0, dense_reduction="sum", **SHORT))
    assert dense == plain


def test_gamma_one_with_the_mean_and_ipo_is_exactly_ipo(tmp_path):
    plain = losses(make(DPOTrainer, DPOConfig, tmp_path, loss_type=["ipo"], **SHORT))
    options = {"dense_gamma": 1.0, "dense_reduction": "mean", "loss_type": ["ipo"]}
    assert_close(losses(make(DPOTrainer, DPOConfig, tmp_path, **options, **SHORT)), plain, rtol=1e-4, atol=1e-5)


def test_the_anchor_on_the_chosen_reply_is_not_weighted(tmp_path):
    # With the preference loss weighted by zero only `sft` is left, and the weights must not touch it.
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 1.0], **SHORT}
    plain = losses(make(DPOTrainer, DPOConfig, tmp_path, **options))
    dense = losses(make(DPOTrainer, DPOConfig, tmp_path, dense_gamma=5.0, dense_reduction="mean", **options))
    assert_close(dense, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        "hinge",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
    ],
)
def test_every_loss_that_reads_a_score_of_the_reply_trains(loss, tmp_path):
    options = {"loss_type": [loss], "label_smoothing": 0.1, "max_steps": 1}
    (loss,) = losses(make(DPOTrainer, DPOConfig, tmp_path, dense_preset="paper", **options))
    assert math.isfinite(loss)


def test_lora_trains_with_dense_weights(tmp_path):
    found, wanted = (
        losses(
            make(
                DPOTrainer, DPOConfig, tmp_path, dense_preset="paper", peft_config=lora(), share_prefix=share, **SHORT
            )
        )
        for share in (True, False)
    )
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert found[-1] < found[0]


def test_where_the_margin_comes_from_is_logged_and_adds_up(tmp_path):
    trainer = make(DPOTrainer, DPOConfig, tmp_path, dense_gamma=1.0, dense_reduction="sum", **SHORT)
    for entry in logs(trainer):
        margin = entry["dense/margin_changed"] + entry["dense/margin_unchanged"]
        assert_close(margin * trainer.beta, entry["rewards/margins"], rtol=1e-3, atol=1e-4)
        assert 0 < entry["dense/changed_share"] < 1
        assert entry["dense/pairs_without_change"] == 0


def test_pairs_without_a_changed_token_are_counted_and_reported(tmp_path, caplog):
    same = rows((1, 1)).map(lambda row: {"rejected": row["chosen"]})
    trainer = make(DPOTrainer, DPOConfig, tmp_path, data=same, dense_preset="paper", **SHORT)
    assert "2 of 2 rows of the train dataset have identical replies" in caplog.text
    entries = logs(trainer)
    assert [entry["dense/pairs_without_change"] for entry in entries] == [2, 4, 6]
    assert all(math.isclose(entry["loss"], math.log(2), abs_tol=1e-4) for entry in entries)


def test_spans_of_the_dataset_take_the_place_of_the_diff(tmp_path):
    data = rows((1, 1))
    spans = [[[0, 1]], [[2, 5]]]
    data = data.add_column("chosen_spans", spans).add_column("rejected_spans", [[], [[0, 5]]])
    trainer = make(DPOTrainer, DPOConfig, tmp_path, data=data, dense_preset="paper", max_steps=1)
    batch = trainer.data_collator([data[0], data[1]])
    decoded = []
    for row in range(4):
        ids = batch["input_ids"][row, 1:][batch["changed_tokens"][0, row]]
        decoded.append(trainer._tokenizer.decode(ids))
    texts = [data[row][side][0]["content"] for side in ("chosen", "rejected") for row in range(2)]
    wanted = [texts[0][0:1], texts[1][2:5], "", texts[3][0:5]]
    assert all(want in got for want, got in zip(wanted, decoded, strict=True))
    assert decoded[2] == ""
    assert len(losses(trainer)) == 1


def test_a_score_leaves_reply_tokens_alone_and_needs_a_prompt():
    log_probs = torch.tensor([[0.0, -1.0, -2.0, 0.0]])
    is_reply = torch.tensor([[False, True, True, False]])
    is_changed = torch.tensor([[False, False, True, False]])
    score = DenseScore(gamma=3.0, reduction="mean").apply(log_probs, is_changed, is_reply)
    assert_close(score[:, 1:], log_probs[:, 1:])
    assert_close(score.sum(1), torch.tensor([-7 / 4]))
    per_token = DenseScore(gamma=3.0, reduction="mean", per_token=True).apply(log_probs, is_changed, is_reply)
    assert_close(per_token.sum(1), torch.tensor([-7 / 2]))
    with pytest.raises(ValueError, match="prompt of one token; Dense DPO needs at least two"):
        DenseScore(gamma=3.0, reduction="sum").apply(log_probs[:, 1:], is_changed[:, 1:], is_reply[:, 1:])


def test_the_gradient_of_a_changed_token_is_gamma_times_that_of_an_unchanged_one():
    log_probs = torch.tensor([[0.0, -1.0, -2.0]], requires_grad=True)
    is_reply, is_changed = torch.tensor([[False, True, True]]), torch.tensor([[False, False, True]])
    DenseScore(gamma=5.0, reduction="sum").apply(log_probs, is_changed, is_reply).sum().backward()
    assert_close(log_probs.grad[0, 1:], torch.tensor([1.0, 5.0]))
