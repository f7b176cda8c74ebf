"""Weights that rows bring for their segments and replies, through the scores of Dense DPO."""

import pytest
import torch
from torch.testing import assert_close

from tests.trainers.dpo.helpers import logs, losses, make, rows
from tests.trainers.dpo.test_averaged import OTHER, with_extra
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.data.errors import RowError
from trl_vlm.maths.changed_tokens import changed_tokens
from trl_vlm.maths.segments import dense_score
from trl_vlm.trainers.dpo.log_probs import DenseScore
from trl_vlm.trainers.dpo.spans import token_places

SUM = {"dense_gamma": 3.0, "dense_reduction": "sum", "max_steps": 2}
MEAN = {"dense_gamma": 3.0, "dense_reduction": "mean", "max_steps": 2}


def data():
    return rows((1, 1))


def train(folder, dataset, **options):
    return make(DPOTrainer, DPOConfig, folder, data=dataset, **options)


def spans_of_the_diff(trainer, row, gamma):
    """Spans of each reply: its changed tokens with weight gamma, the others with 1."""
    batch = trainer.data_collator([row])
    replies = [
        ids[kept.bool()].tolist() for ids, kept in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    spans = []
    for ids, changed, side in zip(replies, changed_tokens(*replies), ("chosen", "rejected"), strict=True):
        text, places = token_places(trainer._tokenizer, ids)
        shift = text.find(row[side][-1]["content"])
        inside = range(len(row[side][-1]["content"]))
        spans.append(
            [
                [max(start - shift, 0), min(end - shift, len(inside)), gamma if is_changed else 1.0]
                for (start, end), is_changed in zip(places, changed, strict=True)
                if max(start - shift, 0) < min(end - shift, len(inside))
            ]
        )
    return spans


@pytest.mark.parametrize("options", [SUM, MEAN], ids=["sum", "mean"])
def test_weights_of_1_and_gamma_reproduce_dense_dpo(options, tmp_path):
    plain = train(tmp_path, data(), **options)
    columns = zip(*(spans_of_the_diff(plain, row, 3.0) for row in data()), strict=True)
    weighted = data()
    for name, column in zip(("chosen_spans", "rejected_spans"), columns, strict=True):
        weighted = weighted.add_column(name, list(column))
    # Gamma is 50 here: nothing is left to it.
    found = losses(train(tmp_path, weighted, **options | {"dense_gamma": 50.0}))
    assert found == pytest.approx(losses(plain), rel=1e-5)


def test_the_score_is_that_computed_by_hand():
    """Six tokens at -1, -2, ..., -6; gamma 5 for the third, weight 2.5 for the fourth, 0 for the fifth; 0.5 in all."""
    log_probs = torch.tensor([[0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0]])
    is_reply = torch.tensor([[False] + [True] * 6])
    is_changed = torch.tensor([[False, False, False, True, True, True, False]])
    nan = torch.nan
    weights = torch.tensor([[nan, nan, nan, nan, 2.5, 0.0, nan]])
    half = torch.tensor([0.5])
    for reduction, wanted in (("sum", 0.5 * -(1 + 2 + 15 + 10 + 0 + 6)), ("mean", 0.5 * -34 / (1 + 1 + 5 + 2.5 + 1))):
        score = DenseScore(gamma=5.0, reduction=reduction).apply(log_probs, is_changed, is_reply, weights, half)
        assert_close(score.sum(1), torch.tensor([wanted]))
        assert_close(score[:, 1:], log_probs[:, 1:])


def test_a_masked_token_of_weight_0_may_be_impossible():
    log_probs = torch.tensor([[0.0, -1.0, -torch.inf]])
    is_reply, is_changed = torch.tensor([[False, True, True]]), torch.tensor([[False, False, True]])
    weights = torch.tensor([[torch.nan, torch.nan, 0.0]])
    found = dense_score(log_probs, is_changed, is_reply, gamma=5.0, reduction="mean", token_weights=weights)
    assert_close(found, torch.tensor([-1.0]))


def test_spans_with_and_without_weights_stand_side_by_side(tmp_path):
    weighted = data().add_column("chosen_spans", [[[0, 1], [2, 5, 4.0]], []])
    weighted = weighted.add_column("rejected_spans", [None, [[0, 5, 0.5]]])
    trainer = train(tmp_path, weighted, **SUM)
    batch = trainer.data_collator([weighted[0], weighted[1]])
    changed, weights = batch["changed_tokens"][0], batch["token_weights"][0]
    text = weighted[0]["chosen"][0]["content"]
    ids = batch["input_ids"][0, 1:]
    assert text[2:5] in trainer._tokenizer.decode(ids[weights[0] == 4.0])
    assert text[0] in trainer._tokenizer.decode(ids[changed[0] & weights[0].isnan()])
    assert not changed[1].any() and weights[1].isnan().all()  # an empty list: nothing is changed
    assert changed[2].any() and weights[2].isnan().all()  # none: the comparison
    assert set(weights[3][changed[3]].tolist()) == {0.5}
    assert len(losses(trainer)) == 2


def test_a_rejected_replys_severity_multiplies_its_score(tmp_path):
    """HSA-DPO: -log sigmoid(beta [D(y+) - s D(y-)]); the metrics of TRL are those of the weighted scores."""
    severity = data().add_column("rejected_score_weight", [0.5, 2.0])
    options = {"dense_gamma": 1.0, "dense_reduction": "sum", "max_steps": 3}
    plain, weighted = (logs(train(tmp_path, each, **options)) for each in (data(), severity))
    first, other = plain[0], weighted[0]
    assert other["logps/chosen"] == pytest.approx(first["logps/chosen"], rel=1e-5)
    trainer = train(tmp_path, data(), **options)
    batch = trainer.data_collator([data()[0], data()[1]])
    with torch.no_grad():
        arguments = trainer._model_arguments({k: v for k, v in batch.items() if k != "changed_tokens"})
        sums = trainer.model(**arguments).log_probs.sum(1)[2:]
    assert other["logps/rejected"] == pytest.approx(((0.5 * sums[0] + 2.0 * sums[1]) / 2).item(), rel=1e-4)


def test_further_replies_have_no_weights_of_their_own(tmp_path):
    weighted = with_extra(data().add_column("rejected_score_weight", [0.5, 2.0]), OTHER)
    batch = train(tmp_path, weighted, **SUM).data_collator([weighted[0], weighted[1]])
    assert batch["score_weights"].tolist() == [[1.0, 1.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[0, 400, 1.0]], r"train row 1.*'chosen_spans'.*the span \(0, 400\) is not inside the reply of"),
        ([[0, 3, -1.0]], r"the span \(0, 3\) has the weight -1.0. It must be a number from 0 on"),
        ([[0, 3, float("nan")]], "has the weight nan"),
        ([[0.5, 3.0, 1.0]], r"the span \(0.5, 3\) is not inside .* in whole characters"),
        ([[0, 3, 1.0, 2.0]], r"it is not a list of \(start, end\) or \(start, end, weight\)"),
    ],
)
def test_a_bad_span_is_named(column, message, tmp_path):
    weighted = data().add_column("chosen_spans", [[[0.0, 1.0, 1.0]], column])
    with pytest.raises(RowError, match=message):
        train(tmp_path, weighted, **SUM)


def test_weights_that_nothing_would_read_are_refused(tmp_path):
    severity = data().add_column("rejected_score_weight", [0.5, 2.0])
    with pytest.raises(
        ValueError, match="column rejected_score_weight, which only Dense DPO reads. Set `dense_gamma=1.0`"
    ):
        train(tmp_path, severity)
    negative = data().add_column("rejected_score_weight", [0.5, -2.0])
    with pytest.raises(
        RowError, match="train row 1, column 'rejected_score_weight': -2.0 is negative, and would turn"
    ):
        train(tmp_path, negative, **SUM)
