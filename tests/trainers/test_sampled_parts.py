"""Replies of a rollout sampled a few at a time are those that are sampled all at once."""

import pytest
import torch

import trl_vlm
from tests.families import saved
from tests.trainers.ppo.helpers import count_letters, rows, settings

IMAGES = [1, 2, 0, 1, 1]


def trainer(folder, method="PPO", family="llava", images=IMAGES, **options):
    common = {"generation_kwargs": {"do_sample": False}, "per_device_train_batch_size": len(images), **options}
    if method == "PPO":
        args = settings(folder, **common)
    else:
        small = {"max_completion_length": 4, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
        common |= {"num_generations": len(images)}
        args = getattr(trl_vlm, f"{method}Config")(str(folder), **small, **common)
    return getattr(trl_vlm, f"{method}Trainer")(
        str(saved(family, sharp=6.0)), reward_funcs=count_letters, args=args, train_dataset=rows(images)
    )


def sampled(made, images=IMAGES):
    """The replies of one rollout, and how many prompts each call of `generate` saw."""
    seen, generate = [], made.model.generate

    def counting(**inputs):
        seen.append(len(inputs["input_ids"]))
        return generate(**inputs)

    made.model.generate = counting
    made.model.train()
    with torch.no_grad():
        batch = made._generate_and_score_completions([made.train_dataset[row] for row in range(len(images))])
    return batch["completion_ids"] * batch["completion_mask"], seen


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "internvl"])
def test_parts_of_a_rollout_have_the_replies_of_the_whole(family, tmp_path):
    images = IMAGES if family != "internvl" else [1, 2, 1, 1, 1]
    whole, at_once = sampled(trainer(tmp_path, family=family, images=images), images)
    parts, seen = sampled(trainer(tmp_path, family=family, images=images, sampling_batch_size=2), images)
    assert at_once == [5] and seen == [2, 2, 1]
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_it_is_an_option_of_all_trainers_with_rollouts(method, tmp_path):
    whole, at_once = sampled(trainer(tmp_path, method))
    parts, seen = sampled(trainer(tmp_path, method, sampling_batch_size=3))
    assert at_once == [5] and seen == [3, 2]
    assert torch.equal(parts, whole)


def test_a_rollout_that_is_small_enough_is_sampled_at_once(tmp_path):
    assert sampled(trainer(tmp_path, sampling_batch_size=5))[1] == [5]


def test_fewer_than_one_reply_and_a_server_that_decides_itself_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`sampling_batch_size` is 0; sample at least 1 reply at once"):
        settings(tmp_path, sampling_batch_size=0)
    with pytest.raises(ValueError, match="`use_vllm` cannot be combined with `sampling_batch_size`"):
        settings(tmp_path, sampling_batch_size=2, use_vllm=True)
