"""The penalty of the mean reward: |mean| over all processes, whatever the signs of their own means."""

import pytest
import torch
from torch.testing import assert_close

from tests.trainers.reward.helpers import llava


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return llava(tmp_path_factory.mktemp("mean"), mean_reward_coefficient=0.5)


@pytest.mark.parametrize(
    "processes", [[[1.0, -4.0]], [[2.0, 3.0]], [[-5.0, 3.0], [6.0, 4.0]], [[5.0, -3.0], [-6.0, -4.0]]]
)
def test_shares_of_the_penalty_average_to_the_absolute_mean_and_its_gradient(trainer, processes, monkeypatch):
    rejected = torch.tensor([0.5, -1.5])
    means = torch.tensor([(torch.tensor(chosen) + rejected).mean() for chosen in processes])
    monkeypatch.setattr(trainer.accelerator, "gather", lambda local: means)
    chosen = [torch.tensor(values, requires_grad=True) for values in processes]
    penalty = sum(trainer._mean_reward_penalty(values, rejected) for values in chosen) / len(processes)
    assert_close(penalty, means.mean().abs())
    penalty.backward()
    for values in chosen:
        assert_close(values.grad, means.mean().sign() * torch.full((2,), 1 / (2 * len(processes))))
