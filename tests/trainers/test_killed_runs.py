"""A run of three epochs that was killed anywhere, inside a rollout or a checkpoint, ends as if it had not been.

Each training is a process of its own that ends itself with SIGKILL. All are forks of one process that has imported
what they need and computed nothing.
"""

import itertools
import json
import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import torch

from tests import families
from tests.lora_models import reward_adapter
from tests.trainers import killed_main
from trl_vlm.models import last_complete_checkpoint
from trl_vlm.models.reward_model import load_reward_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # twenty trainings, one after the other

# How often each run is killed.
KILLS = {"dpo": 20, "dpo lora": 3, "dpo image pair": 3, "dpo pair source": 3, "sft": 3}
KILLS |= {"ppo": 20, "ppo lora": 3, "grpo": 3, "rloo": 3}
ONE_BASE = "ppo one base"
WRITING = ("weights half written", "weights written", "optimizer half written", "state half written")
Moment = tuple[int, str]


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([killed_main.__name__])
    return context


def train(processes, run, folder, journal, dies_at=None):
    """The training's exit code, and the moments that it reached: (micro-batches, what is done, rows)."""
    journal.write_text("")  # a run that was killed behind its last checkpoint comes to no moment
    model = str(families.saved("llava", sharp=4.0))
    process = processes.Process(target=killed_main.train, args=(run, model, folder, journal, dies_at))
    process.start()
    process.join()
    return process.exitcode, [tuple(json.loads(line)) for line in journal.read_text().splitlines()]


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / killed_main.LAST_WEIGHTS)


def random_moments(run: str, moments: list[Moment]) -> list[Moment]:
    """Moments of the run in their order, drawn until some lie where resuming is hard."""
    last = moments[-1][0]
    for seed in itertools.count():
        places = sorted(random.Random(seed).sample(range(len(moments)), KILLS.get(run, 10)))
        chosen = [moments[place] for place in places]
        in_last_epoch = any(2 * last / killed_main.EPOCHS < number < last for number, _ in chosen)
        while_writing = any(name in WRITING for _, name in chosen)
        in_rollout = "dpo" in run or run == "sft" or any(name == "rollout made" for _, name in chosen)
        between = any(number % 2 for number, _ in chosen)  # in an accumulation, or between two uses of a rollout
        if in_last_epoch and while_writing and in_rollout and between:
            return chosen


@pytest.mark.nightly
@pytest.mark.parametrize("run", [*KILLS, ONE_BASE])
def test_a_run_killed_at_random_moments_sees_the_rows_and_ends_with_the_weights_of_an_uninterrupted_one(
    run, processes, tmp_path
):
    journal = tmp_path / "moments.jsonl"
    if run == ONE_BASE:
        reward_adapter(families.saved("llava", sharp=4.0), tmp_path / killed_main.REWARD_MODEL)
    exit_code, reached = train(processes, run, tmp_path / "whole", journal)
    assert exit_code == 0
    expected = {(number, name): rows for number, name, rows in reached}
    assert len(expected) == len(reached)
    # In their order: each run goes on from a checkpoint before the last kill, and comes to the next moment.
    for moment in random_moments(run, list(expected)):
        exit_code, reached = train(processes, run, tmp_path / "killed", journal, dies_at=moment)
        assert exit_code == -signal.SIGKILL, f"{moment} was not reached"
        check_rows(reached, expected, moment)
    exit_code, reached = train(processes, run, tmp_path / "killed", journal)
    assert exit_code == 0
    check_rows(reached, expected, "the end")
    weights, wanted = last_weights(tmp_path / "killed"), last_weights(tmp_path / "whole")
    assert weights.keys() == wanted.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, wanted[name]), name
    if run == ONE_BASE:
        check_roles(tmp_path / "killed", tmp_path / "whole")


def check_roles(killed, whole):
    """Each role in the last checkpoint loads by itself and scores as that of the uninterrupted run."""
    batch = families.batch(families.load_processor("llava"), [1, 2])
    for role in ("value_model", "reward_model"):
        places = [f"{last_complete_checkpoint(folder)}/{role}" for folder in (killed, whole)]
        with torch.no_grad():
            scores = [load_reward_model(place, for_scoring=True)(**batch).logits for place in places]
        assert scores[0].any() and torch.equal(*scores), role


def check_rows(reached, expected, killed_at):
    for number, name, rows in reached:
        assert (number, name) in expected, f"killed at {killed_at}: only this run came to {number}, {name}"
        assert rows == expected[number, name], f"killed at {killed_at}: other rows at {number}, {name}"
