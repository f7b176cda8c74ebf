import math

import pytest
import torch

from trl_vlm.evaluation import answers_from_logits, pope


def test_hand_counted_answers():
    answers = ["Yes.", "yes, a dog", "No", "No.", "There is a dog.", "Not sure"]
    gold = ["yes", "no", "yes", "no", "yes", "no"]
    scores = pope(answers, gold)["all"]
    assert scores.accuracy == 2 / 6
    assert scores.precision == 1 / 2
    assert scores.recall == 1 / 3
    assert scores.f1 == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert scores.yes_rate == 2 / 6
    assert scores.unparsable == 2 / 6
    assert scores.questions == 6


def test_categories_are_scored_apart():
    scores = pope(
        ["yes", "no", "yes", "yes"], ["yes", "no", "yes", "no"], ["random", "random", "adversarial", "adversarial"]
    )
    assert list(scores) == ["all", "random", "adversarial"]
    assert [scores[name].accuracy for name in scores] == [3 / 4, 1, 1 / 2]
    assert [scores[name].yes_rate for name in scores] == [3 / 4, 1 / 2, 1]
    assert [scores[name].questions for name in scores] == [4, 2, 2]


def test_always_yes_has_full_recall_and_a_yes_rate_that_shows_it():
    scores = pope(["yes"] * 4, ["yes", "no"] * 2)["all"]
    assert (scores.accuracy, scores.precision, scores.recall, scores.yes_rate) == (1 / 2, 1 / 2, 1, 1)


def test_never_yes_has_no_precision_and_no_f1():
    scores = pope(["no"] * 2, ["yes", "no"])["all"]
    assert (scores.accuracy, scores.precision, scores.recall, scores.f1) == (1 / 2, 0, 0, 0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="0 answers"):
        pope([], [])
    with pytest.raises(ValueError, match="1 answers, 2 gold answers"):
        pope(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="row 1: the gold answer is True"):
        pope(["yes", "no"], ["yes", True])


def test_logits_decide_by_preference():
    assert answers_from_logits(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])) == ["yes", "no", "no"]
    with pytest.raises(ValueError, match=r"must both be \(B,\)"):
        answers_from_logits(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="row 1: a logit is NaN"):
        answers_from_logits(torch.zeros(2), torch.tensor([0.0, math.nan]))
