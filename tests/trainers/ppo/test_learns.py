"""PPO learns from pictures, in the small; `benchmarks/studies/ppo_colours.py` has three seeds, a control and RLOO."""

import pytest

from benchmarks.studies.ppo_colours import CHANCE, train


@pytest.mark.slow
def test_ppo_learns_to_name_colours_and_not_those_of_shuffled_pictures(tmp_path):
    run = train("ppo", seed=0, rollouts=40, folder=str(tmp_path / "ppo"))
    assert run["first_reward"] < CHANCE
    assert run["new_pictures_reward"] > 0.8
    shuffled = train("ppo, shuffled pictures", seed=0, rollouts=20, folder=str(tmp_path / "shuffled"))
    assert shuffled["last_reward"] < CHANCE + 0.1
