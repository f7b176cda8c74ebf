import pytest
import torch
from torch.testing import assert_close

from trl_vlm.maths.segments import dense_score, segment_weights


def test_the_dense_score_of_the_papers_formula_by_hand():
    logps = torch.tensor([-1.0, -1.0, -2.0, -2.0, -1.0, -1.0, -9.0])
    is_changed = torch.tensor([False, False, True, True, False, False, True])
    is_reply = torch.tensor([True] * 6 + [False])
    mean = dense_score(logps, is_changed, is_reply, gamma=5.0, reduction="mean")
    assert_close(mean, torch.tensor(-24 / 14))
    assert round(mean.item(), 4) == -1.7143
    assert_close(dense_score(logps, is_changed, is_reply, gamma=1.1, reduction="sum"), torch.tensor(-8.4))


def test_gamma_one_is_the_plain_sum_and_the_plain_mean():
    logps = -torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    is_changed, is_reply = torch.rand(3, 5) > 0.5, torch.ones(3, 5, dtype=torch.bool)
    assert_close(dense_score(logps, is_changed, is_reply, gamma=1.0, reduction="sum"), logps.sum(1))
    assert_close(dense_score(logps, is_changed, is_reply, gamma=1.0, reduction="mean"), logps.mean(1))


def test_a_large_gamma_leaves_the_mean_of_the_changed_tokens():
    logps = torch.tensor([-1.0, -3.0, -5.0])
    score = dense_score(logps, torch.tensor([False, True, True]), torch.ones(3).bool(), gamma=1e6, reduction="mean")
    assert_close(score, torch.tensor(-4.0), rtol=1e-5, atol=1e-5)


def test_weights_of_a_mean_sum_to_one_and_are_the_formula_written_out():
    generator = torch.Generator().manual_seed(0)
    is_changed, is_reply = (torch.rand(4, 9, generator=generator) > 0.5 for _ in range(2))
    weights = segment_weights(is_changed, is_reply, gamma=3.0, reduction="mean")
    for row in range(4):
        gains = [3.0 if c else 1.0 for c, r in zip(is_changed[row], is_reply[row], strict=True) if r]
        assert_close(weights[row, is_reply[row]], torch.tensor(gains) / sum(gains))
        assert weights[row, ~is_reply[row]].sum() == 0


def test_an_empty_reply_scores_zero():
    nothing = torch.zeros(2, dtype=torch.bool)
    for score in ("mean", "sum"):
        assert dense_score(torch.tensor([-1.0, -2.0]), nothing, nothing, gamma=5.0, reduction=score) == 0.0


def test_an_unknown_score_is_an_error():
    with pytest.raises(ValueError, match="'mean' \\(the paper\\) or 'sum'"):
        segment_weights(torch.zeros(1).bool(), torch.ones(1).bool(), gamma=2.0, reduction="average")
