import pytest
import torch
from torch.testing import assert_close

from trl_vlm.maths.losses import adapted_kl_coef, clipped_value_loss, mean_reward_penalty


def test_value_loss_by_hand():
    # inside the clip range; moved away from the return beyond it; moved towards the return beyond it
    values, old, returns = torch.tensor([[0.1, -1.0, 1.0]]), torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 1.0]])
    terms = clipped_value_loss(values, old, returns, cliprange=0.2)
    assert_close(terms.loss, 0.5 * torch.tensor([[0.81, 4.0, 0.64]]))
    assert_close(terms.clipped, torch.tensor([[0.0, 0.0, 1.0]]))


def test_a_value_that_moved_far_enough_towards_its_return_gets_no_gradient():
    values = torch.tensor([[1.0, 0.1]], requires_grad=True)
    clipped_value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), cliprange=0.2).loss.sum().backward()
    assert_close(values.grad, torch.tensor([[0.0, -0.9]]))


def test_with_a_wide_clip_range_it_is_half_the_squared_error():
    values, returns = torch.randn(2, 2, 5)
    terms = clipped_value_loss(values, torch.zeros(2, 5), returns, cliprange=1e6)
    assert_close(terms.loss, 0.5 * (values - returns) ** 2)
    assert not terms.clipped.any()


def test_mean_reward_penalty_is_the_absolute_mean_of_the_sums():
    assert_close(mean_reward_penalty(torch.tensor([1.0, -4.0]), torch.tensor([0.5, -1.5])), torch.tensor(2.0))


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.001), (60.0, 1.002), (0.0, 0.998)])
def test_the_kl_coefficient_moves_towards_its_target_by_at_most_a_fifth_per_horizon(kl, factor):
    assert adapted_kl_coef(0.2, kl, target=6.0, horizon=10_000, replies=100) == pytest.approx(0.2 * factor)
