import math

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from trl_vlm.maths.masked import masked_mean, masked_sum, weighted_mean


def test_a_masked_sum_adds_what_the_mask_keeps_even_beside_infinities():
    values = torch.tensor([1.0, math.inf, 4.0, math.nan])
    assert masked_sum(values, torch.tensor([True, False, True, False])) == 5.0


def test_a_masked_mean_divides_by_the_number_of_kept_values():
    values = torch.tensor([[1.0, 2.0, 9.0], [5.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert_close(masked_mean(values, mask, dim=1), torch.tensor([1.5, 5.0]))


def test_an_empty_mask_gives_zero():
    assert masked_mean(torch.tensor([3.0]), torch.tensor([False])) == 0.0
    assert weighted_mean(torch.tensor([3.0]), torch.tensor([0.0])) == 0.0


def test_a_weighted_mean_by_hand():
    assert_close(weighted_mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])), torch.tensor(2.0))


def test_weight_one_recovers_the_plain_mean():
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert_close(weighted_mean(values, torch.ones_like(values)), values.mean(-1))


def test_padding_changes_no_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(3, 5, generator=generator), torch.rand(3, 5, generator=generator)
    padded = F.pad(values, (0, 4), value=-math.inf), F.pad(weights, (0, 4))
    assert_close(weighted_mean(*padded), weighted_mean(values, weights))


def test_no_gradient_reaches_a_position_without_weight():
    values = torch.tensor([1.0, -math.inf, 2.0], requires_grad=True)
    weighted_mean(values, torch.tensor([1.0, 0.0, 3.0])).backward()
    assert_close(values.grad, torch.tensor([0.25, 0.0, 0.75]))
