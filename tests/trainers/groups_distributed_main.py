"""What `tests.distributed.launch` runs: trainers without and with shared groups, whose replies two processes hold."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.trainers.group_helpers import logged, make, weights
from tests.trainers.ppo.helpers import lora, reward_each_token

OPTIONS = {
    "GRPO": {"beta": 0.1},
    "RLOO": {"beta": 0.1},
    "PPO": {"kl_coef": 0.5, "num_ppo_epochs": 1, "check_pixels": False},
}


def whole_weights(trainer: Any) -> dict[str, Tensor]:
    """What trains, on the first process, after a run."""
    names = {name.replace(".module.", ".") for name, p in trainer.model.named_parameters() if p.requires_grad}
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return weights(trainer)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {name: value.float().cpu() for name, value in state.items() if name in names}


def main(
    folder: Path,
    trainer_arguments: dict[str, Any],
    model: str,
    methods: list[str],
    options: dict[str, Any] | None = None,
    adapters: bool = False,
) -> tuple[Any, dict[str, Any]]:
    report: dict[str, Any] = {}
    trainer = None
    for method in methods:
        runs = []
        for share in (False, True):
            # Four replies of six stand on one process and two on the other.
            trainer = make(
                method,
                folder / f"{method}_{share}",
                path=model,
                peft=lora() if adapters else None,
                num_generations=6,
                per_device_train_batch_size=3,
                gradient_accumulation_steps=2,
                share_prefix=share,
                more={"reward_funcs": reward_each_token} if method == "PPO" else None,
                **OPTIONS[method],
                **(options or {}),
                **trainer_arguments,
            )
            trainer.train()
            assert trainer.shares_groups is share
            runs.append((logged(trainer), whole_weights(trainer)))
        (plain, wanted), (shared, found) = runs
        distance = max(((found[name] - wanted[name]).abs().max().item() for name in wanted), default=0.0)
        report[method] = {"plain": plain, "shared": shared, "distance": distance, "weights": sorted(wanted)}
    return trainer, report
