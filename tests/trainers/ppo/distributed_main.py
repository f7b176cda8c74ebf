"""What `tests.distributed.launch` runs: PPO of a tiny llava with greedy replies, with its logs as the report."""

from pathlib import Path

from transformers.integrations import is_deepspeed_zero3_enabled

from tests.trainers.ppo.helpers import count_letters, lora, reward_each_token, rows, settings
from trl_vlm import PPOTrainer

REPORTED = ("loss", "grad_norm", "ppo/score", "ppo/kl", "ppo/value_mean", "ppo/value_loss", "ppo/explained_variance")


def watch_gathering(trainer: PPOTrainer) -> list[dict[str, float]]:
    """What is gathered for each generation under ZeRO-3: the shares of the policy's and of the critic's parameters."""
    import deepspeed

    critic = {id(parameter) for parameter in trainer.value_model.parameters()}
    policy = {id(parameter) for parameter in trainer.model.parameters()} - critic
    found: list[dict[str, float]] = []
    gather = deepspeed.zero.GatheredParameters

    def noting(parameters, *args, **kwargs):
        parameters = list(parameters)
        asked = {id(parameter) for parameter in parameters}
        found.append({"policy": len(asked & policy) / len(policy), "critic": len(asked & critic) / len(critic)})
        return gather(parameters, *args, **kwargs)

    deepspeed.zero.GatheredParameters = noting
    return found


def main(
    folder: Path,
    trainer_arguments: dict,
    model: str,
    batch: int,
    images: list[int],
    adapter: bool = False,
    reward_model: str | None = None,
    each_token: bool = False,
):
    trainer = PPOTrainer(
        model,
        reward_funcs=reward_each_token if each_token else count_letters,
        args=settings(
            folder / "out",
            per_device_train_batch_size=batch,
            max_steps=3,
            learning_rate=5e-3,
            shuffle_dataset=False,
            kl_coef=0.5,
            vf_coef=1.0,
            share_base=False,  # shared_distributed_main.py has the other kind
            generation_kwargs={"do_sample": False},  # so that replies do not depend on the number of processes
            **trainer_arguments,
        ),
        train_dataset=rows(images),
        peft_config=lora() if adapter else None,
        reward_model=reward_model,
    )
    gathered = watch_gathering(trainer) if is_deepspeed_zero3_enabled() else []
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, {"gathered": gathered[:3], **{name: [entry[name] for entry in logs] for name in REPORTED}}
