"""What `tests.distributed.launch` runs: ten steps of PPO on one rollout, four roles on one base, in some precision.

One rollout, because a rounding may change a reply where two tokens are nearly as likely, and what follows differs.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.trainers.ppo.helpers import lora, rows, settings
from tests.trainers.ppo.shared_distributed_main import set_start, trained_weights
from trl_vlm import PPOTrainer
from trl_vlm.trainers.ppo.rollout import Rollout, reply_mask
from trl_vlm.trainers.types import gathered


def keep_rollouts(trainer: PPOTrainer) -> list[Rollout]:
    """The rollouts of the training that follows."""
    made: list[Rollout] = []
    make = trainer._generate_and_score_completions

    def keep(inputs: list[dict[str, Any]]) -> Rollout:
        made.append(make(inputs))
        return made[-1]

    trainer._generate_and_score_completions = keep
    return made


def main(
    folder: Path, trainer_arguments: dict, model: str, reward_model: str, batch: int, images: list[int], **options: Any
):
    """The report has a list per reply, with the numbers of its tokens; one score per reply; and one loss per step."""
    trainer = PPOTrainer(
        model,
        args=settings(
            folder / "out",
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            max_steps=10,
            num_ppo_epochs=10,
            optim="sgd",  # Adam would turn the rounding of a tiny gradient into a step of the learning rate
            learning_rate=0.3,
            shuffle_dataset=False,
            kl_coef=0.5,
            vf_coef=1.0,
            share_base=True,
            value_head_init="trained",  # a head of zeros would start without rounding
            gradient_checkpointing=True,
            generation_kwargs={"do_sample": False},
            **trainer_arguments,
            **options,
        ),
        train_dataset=rows(images),
        peft_config=lora(),
        reward_model=reward_model,
    )
    set_start(trainer)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    made = keep_rollouts(trainer)
    trainer.train()
    rollout = made[0]
    with torch.no_grad():
        log_probs = trainer._score_tokens(trainer.model, rollout)
        values = trainer._score_tokens(trainer._critic.as_policy(), rollout)

    def all_replies(numbers: Tensor) -> list[list[float]]:
        numbers = (numbers * reply_mask(rollout)).float().contiguous()
        return gathered(trainer.accelerator, trainer.accelerator.pad_across_processes(numbers, dim=1)).tolist()

    report = {
        "tokens": all_replies(rollout["completion_ids"]),
        "log_probs": all_replies(rollout["old_per_token_logps"]),
        "reference_log_probs": all_replies(rollout["ref_per_token_logps"]),
        "values": all_replies(rollout["old_values"]),
        "trained_log_probs": all_replies(log_probs),
        "trained_values": all_replies(values),
        "scores": trainer._scores.tolist(),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    weights = trained_weights(trainer)
    if trainer.accelerator.is_main_process:
        torch.save({name: weights[name] for name in sorted(trained)}, folder / "weights.pt")
    return trainer, report
