"""How the batch is cut up does not change the gradient: mini-batches, accumulation, ragged replies."""

import torch
from torch.testing import assert_close

from tests import families
from tests.trainers.ppo.helpers import count_letters, rows, settings
from trl_vlm import PPOTrainer


def mean_gradients(folder, **options):
    """The mean over the optimizer steps of one rollout of each parameter's gradient; nothing is updated."""
    trainer = PPOTrainer(
        str(families.saved("llava", sharp=3.0)),
        reward_funcs=count_letters,
        args=settings(
            folder,
            learning_rate=0.0,
            optim="sgd",
            max_grad_norm=0.0,
            whiten_advantages=False,
            cliprange_value=10.0,
            max_completion_length=6,
            **options,
        ),
        train_dataset=rows([1, 1, 2, 1]),
    )
    found: list[dict[str, torch.Tensor]] = []

    def remember(*_):
        named = trainer.model.named_parameters()
        found.append({name: value.grad.clone() for name, value in named if value.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(remember)
    trainer.train()
    assert len(found) == options["max_steps"]
    return {name: sum(step[name] for step in found) / len(found) for name in found[0]}


def test_mini_batches_and_accumulation_give_the_gradient_of_one_large_batch(tmp_path):
    whole = mean_gradients(tmp_path, per_device_train_batch_size=4, max_steps=1)
    assert {name.startswith("value_model") for name, gradient in whole.items() if gradient.any()} == {True, False}
    cuts = {
        "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 1},
        "mini-batches": {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "max_steps": 2},
    }
    for cut, options in cuts.items():
        gradients = mean_gradients(tmp_path, per_device_train_batch_size=2, **options)
        for name, gradient in whole.items():
            assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, cut=cut: f"{cut}: {text}")
