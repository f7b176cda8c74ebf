"""What `tests.distributed.launch` runs: reward training of a tiny llava, with its losses as the report."""

from pathlib import Path

from tests.preference_rows import preference_rows
from trl_vlm import RewardConfig, RewardTrainer


def main(folder: Path, trainer_arguments: dict, model: str, batch: int, images: list[int], steps: int = 3, **more):
    args = RewardConfig(
        str(folder / "out"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=1e-2,
        logging_steps=1,
        mean_reward_coefficient=0.5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **trainer_arguments,
        **more,
    )
    trainer = RewardTrainer(model, args, train_dataset=preference_rows(images), eval_dataset=preference_rows([1] * 5))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluation = trainer.evaluate()
    return trainer, {
        "losses": [entry["loss"] for entry in logs],
        "margins": [entry["margin"] for entry in logs],
        "evaluation": {key: value for key, value in evaluation.items() if "reward" in key or key in WHOLE},
    }


WHOLE = ("eval_accuracy", "eval_margin")
