"""What `tests.distributed.launch` runs: ten steps of PPO on one rollout, four roles on one base, in some precision.

Chosen so that two runs differ by their rounding and by nothing that a rounding can set off:

- One rollout, and `CLEAR_DRAWS` of rows: where two tokens are nearly as likely, a rounding changes a reply.
- Each process has two rows, the longest as long as that of the other, so that all runs pad alike.
- No clipping, which would be a decision, and small steps of plain SGD, which lead to smaller errors, not to larger
  ones. Adam would turn the rounding of a tiny gradient into a step of the learning rate.
- Adapters and heads start from numbers that bf16 has: DeepSpeed makes its float32 weights out of bf16 ones.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import families
from tests.trainers.ppo.helpers import lora, rows, settings
from tests.trainers.ppo.shared_distributed_main import set_start, trained_weights
from trl_vlm import PPOTrainer
from trl_vlm.trainers.ppo.rollout import Rollout, reply_mask
from trl_vlm.trainers.types import gathered

# Of 60 draws, those where the first token leads the second most: by 0.020 to 0.029 in each of the 16 choices.
CLEAR_DRAWS = (7, 39, 59, 40, 55, 16)


def keep_rollouts(trainer: PPOTrainer) -> list[Rollout]:
    """The rollouts of the training that follows."""
    made: list[Rollout] = []
    make = trainer._generate_and_score_completions

    def keep(inputs: list[dict[str, Any]]) -> Rollout:
        made.append(make(inputs))
        return made[-1]

    trainer._generate_and_score_completions = keep
    return made


def round_start(trainer: PPOTrainer) -> None:
    """Rounds the policy's adapter to bf16 numbers; the other roles start from a folder of such."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name and not parameter.is_meta:
                parameter.copy_(parameter.bfloat16())


def float_weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    """The trained weights as the optimizer steps them, in float32, whole, on the first process."""
    if not trainer.is_deepspeed_enabled:
        return trained_weights(trainer)
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trained.items()}


def all_replies(trainer: PPOTrainer, rollout: Rollout, numbers: Tensor) -> list[list[float]]:
    """A list per reply of all processes, with the numbers of its tokens."""
    numbers = (numbers * reply_mask(rollout)).float().contiguous()
    return gathered(trainer.accelerator, trainer.accelerator.pad_across_processes(numbers, dim=1)).tolist()


def log_probs_and_values(trainer: PPOTrainer, rollout: Rollout) -> tuple[list[list[float]], list[list[float]]]:
    """Of the policy and the critic as they are now."""
    with torch.no_grad():
        numbers = [trainer._score_tokens(role, rollout) for role in (trainer.model, trainer._critic.as_policy())]
    log_probs, values = (all_replies(trainer, rollout, each) for each in numbers)
    return log_probs, values


def train(
    folder: Path, trainer_arguments: dict, model: str, reward_model: str, batch: int, draw: int, **options: Any
) -> tuple[PPOTrainer, Rollout, dict]:
    """One run: the trainer, its rollout, and a report with one score per reply and one loss per step."""
    trainer = PPOTrainer(
        model,
        args=settings(
            folder / f"out-{draw}",
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            max_steps=10,
            num_ppo_epochs=10,
            optim="sgd",
            learning_rate=0.1,
            value_learning_rate=1e-4,
            max_grad_norm=1e4,
            cliprange=100.0,
            cliprange_value=1000.0,
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
        train_dataset=rows([1, 2, 1] * 2, first=6 * draw).select([0, 1, 3, 4]),
        peft_config=lora(),
        reward_model=reward_model,
    )
    set_start(trainer, 3 + draw)
    round_start(trainer)
    made = keep_rollouts(trainer)
    trainer.train()
    rollout = made[0]
    trained_log_probs, trained_values = log_probs_and_values(trainer, rollout)
    report = {
        "tokens": all_replies(trainer, rollout, rollout["completion_ids"]),
        "log_probs": all_replies(trainer, rollout, rollout["old_per_token_logps"]),
        "reference_log_probs": all_replies(trainer, rollout, rollout["ref_per_token_logps"]),
        "values": all_replies(trainer, rollout, rollout["old_values"]),
        "scores": trainer._scores.tolist(),
        "trained_log_probs": trained_log_probs,
        "trained_values": trained_values,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    weights, saved = float_weights(trainer), trained_weights(trainer)
    if trainer.accelerator.is_main_process:
        parts = {"weights": weights, "saved": saved}
        torch.save({part: {name: held[name] for name in names} for part, held in parts.items()}, folder / f"{draw}.pt")
    return trainer, rollout, report


def numbers_of_roles(folder: str, policy: Callable, values: Callable, scores: Callable) -> dict[str, list]:
    """What models compute in bf16 of two rows: log-probabilities of all tokens, a value of each token, and scores."""
    batch = families.batch(families.load_processor(folder), [1, 2])
    mask = batch["attention_mask"].bool()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        numbers = {"log_probs": policy(**batch).logits.float().log_softmax(-1)[mask]}
        numbers |= {"values": values(**batch)[mask], "scores": scores(**batch).logits}
    return {name: value.float().tolist() for name, value in numbers.items()}


def saved_roles(trainer: PPOTrainer, folder: Path, model: str) -> dict[str, list]:
    """Saves the trained run, and computes with its roles."""
    trainer.save_model(str(folder / "saved"))
    base = trainer._critic.shared_base
    assert base is not None
    with base.evaluating():
        roles = base.roles
        return numbers_of_roles(model, trainer.model, roles["value_model"].token_scores, roles["reward_model"])


def main(folder: Path, trainer_arguments: dict, draws: Sequence[int], **arguments: Any) -> tuple[PPOTrainer, dict]:
    """A run on each draw of rows and adapters: their reports by draw, as JSON has it; and what the last one saves."""
    reports = {}
    for draw in draws:
        trainer, _, reports[str(draw)] = train(folder, trainer_arguments, draw=draw, **arguments)
    return trainer, {"draws": reports, "roles": saved_roles(trainer, folder, arguments["model"])}
