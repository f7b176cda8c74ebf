"""What `tests.distributed.launch` runs: PPO of four roles on one base, with its logs and its weights as the report."""

from pathlib import Path

import torch
from torch import Tensor

from tests.trainers.ppo.helpers import lora, reward_each_token, rows, settings
from trl_vlm import PPOTrainer

REPORTED = ("loss", "grad_norm", "ppo/score", "ppo/kl", "ppo/value_mean", "ppo/value_loss")


def set_start(trainer: PPOTrainer, seed: int = 3) -> None:
    """Draws the new adapters anew, the same under every backend: ZeRO-3 draws others than one process."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(trainer.model.named_parameters()):
            if "lora_A.default" in name:
                drawn = torch.empty(parameter.shape).uniform_(-0.2, 0.2, generator=generator)
                if not parameter.is_meta:  # under FSDP only the first process holds values
                    parameter.copy_(drawn)


def trained_weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    """The adapters and heads, whole, on the first process."""
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    model = trainer.model_wrapped if sharded else trainer.model
    state = trainer.accelerator.get_state_dict(model) if sharded else model.state_dict()
    return {
        name: value.float().cpu().clone()
        for name, value in (state or {}).items()
        if "lora_" in name or "score" in name
    }


def main(
    folder: Path,
    trainer_arguments: dict,
    model: str,
    reward_model: str,
    batch: int,
    images: list[int],
    options: dict,
    resume: str | None = None,
):
    trainer = PPOTrainer(
        model,
        reward_funcs=reward_each_token,  # beside the reward model
        args=settings(
            folder / "out",
            **{
                "per_device_train_batch_size": batch,
                "max_steps": 10,
                "num_ppo_epochs": 2,
                "optim": "sgd",
                "learning_rate": 0.3,
                "shuffle_dataset": False,
                "kl_coef": 0.5,
                "vf_coef": 1.0,
                "share_base": True,
                "generation_kwargs": {"do_sample": False},
                **trainer_arguments,
                **options,
            },
        ),
        train_dataset=rows(images),
        peft_config=lora(),
        reward_model=reward_model,
    )
    set_start(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "saved"))
    weights = trained_weights(trainer)
    if trainer.accelerator.is_main_process:
        torch.save(weights, folder / "weights.pt")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, {name: [entry.get(name) for entry in logs] for name in REPORTED}
