"""A run that was killed anywhere, in any epoch, ends as if it had not been."""

import random
from pathlib import Path

import pytest
import torch
import trl

from tests import families
from tests.trainers.ppo.helpers import count_letters, lora, rows, settings
from trl_vlm import PPOTrainer
from trl_vlm.models import last_complete_checkpoint
from trl_vlm.trainers.resuming import ResumableRepeatSampler

pytestmark = pytest.mark.slow

ROLLOUT_STEPS = 2  # two epochs of one mini-batch over each rollout


class Killed(Exception):
    """Stands for a kill: nothing behind it is run."""


class Watched(PPOTrainer):
    """Writes down which rows each rollout saw, and dies at a micro-batch."""

    seen: list[tuple[int, list[str]]]
    dies_at: int | None = None

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            self.seen.append((self._step, [row["prompt"][0]["content"] for row in inputs]))
        return super()._generate_and_score_completions(inputs)

    def training_step(self, *args, **kwargs):
        if self._step == self.dies_at:
            raise Killed
        return super().training_step(*args, **kwargs)


def numbered(count):
    dataset = rows([1, 0, 2, 1, 1, 0][:count])
    prompts = [[{"role": "user", "content": f"What is in picture {number}?"}] for number in range(count)]
    return dataset.remove_columns("prompt").add_column("prompt", prompts)


def make(folder, dies_at=None, adapter=None, eval_dataset=None, **options):
    trainer = Watched(
        str(families.saved("llava", sharp=3.0)),
        reward_funcs=count_letters,
        args=settings(
            folder,
            **{
                "max_steps": -1,
                "num_train_epochs": 3,
                "num_ppo_epochs": ROLLOUT_STEPS,
                "save_strategy": "steps",
                "save_steps": 3,
                **options,
            },
        ),
        train_dataset=numbered(6),
        eval_dataset=eval_dataset,
        peft_config=adapter,
    )
    trainer.seen, trainer.dies_at = [], dies_at
    return trainer


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.fixture(scope="module", params=["full", "lora"])
def uninterrupted(request, tmp_path_factory):
    adapter = lora() if request.param == "lora" else None
    trainer = make(tmp_path_factory.mktemp("whole"), adapter=adapter)
    trainer.train()
    return adapter, trainer, weights(trainer)


def test_a_run_killed_at_random_moments_of_three_epochs_sees_the_same_rows_and_ends_with_the_same_weights(
    uninterrupted, tmp_path
):
    adapter, whole, final = uninterrupted
    assert whole.state.global_step == 18 and len(whole.seen) == 9
    expected = dict(whole.seen)
    moments = sorted(random.Random(0).sample(range(2, 18), 10))
    for moment in [*moments, None]:
        run = make(tmp_path, dies_at=moment, adapter=adapter)
        checkpoint = last_complete_checkpoint(tmp_path)
        if moment is None:
            run.train(resume_from_checkpoint=checkpoint)
        else:
            with pytest.raises(Killed):
                run.train(resume_from_checkpoint=checkpoint)
        for step, prompts in run.seen:
            assert prompts == expected[step], f"killed at {moment}, rollout at {step}"
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, final[name]), name


def test_checkpoints_are_saved_where_a_rollout_ends(uninterrupted):
    _, whole, _ = uninterrupted
    steps = sorted(int(path.name.split("-")[1]) for path in Path(whole.args.output_dir).glob("checkpoint-*"))
    assert steps == [4, 6, 10, 12, 16, 18]  # `save_steps=3`: the odd ones a step later


def test_the_best_checkpoint_is_not_looked_for_inside_a_rollout(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    with pytest.raises(ValueError, match=r"ends inside a rollout of 2 optimizer steps.*to a multiple of 2"):
        make(tmp_path, eval_dataset=numbered(2), **options)


def test_an_uninterrupted_run_has_the_order_of_trl():
    stock = trl.trainer.utils.RepeatSampler(list(range(7)), 2, batch_size=3, repeat_count=2, seed=5)
    ours = ResumableRepeatSampler.like(stock)
    for epoch in range(3):
        ours.set_epoch(epoch)
        assert list(ours) == list(stock)
    again = ResumableRepeatSampler.like(stock)
    again.set_epoch(2)
    ours.set_epoch(2)
    assert list(again) == list(ours)


def test_tripwire_trl_still_begins_its_order_anew_on_resuming():
    """When this fails, TRL resumes in a later epoch: delete `ResumableRepeatSampler`."""
    assert not hasattr(trl.trainer.utils.RepeatSampler, "set_epoch")
