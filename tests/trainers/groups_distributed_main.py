"""What `tests.distributed.launch` runs: GRPO without and with shared groups, whose replies two processes hold."""

from pathlib import Path
from typing import Any

from tests.trainers.group_helpers import logged, make, weights


def main(folder: Path, trainer_arguments: dict[str, Any], model: str) -> tuple[Any, dict[str, Any]]:
    runs = []
    for share in (False, True):
        # Four replies of six stand on one process and two on the other.
        trainer = make(
            "GRPO",
            folder / str(share),
            path=model,
            num_generations=6,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            beta=0.1,
            share_prefix=share,
            **trainer_arguments,
        )
        start = weights(trainer)
        trainer.train()
        assert trainer.shares_groups is share
        runs.append((logged(trainer), weights(trainer)))
    (plain, wanted), (shared, found) = runs
    distance = max((found[name] - wanted[name]).abs().max().item() for name in wanted)
    moved = max((wanted[name] - start[name]).abs().max().item() for name in wanted)
    return trainer, {"plain": plain, "shared": shared, "distance": distance, "moved": moved}
