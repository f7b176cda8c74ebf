"""What `tests.distributed.launch` runs: reward training of a tiny llava, with its losses as the report."""

from pathlib import Path

from tests.preference_rows import preference_rows
from trl_vlm import RewardConfig, RewardTrainer

WHOLE = ("eval_accuracy", "eval_margin")


def main(folder: Path, trainer_arguments: dict, model: str, batch: int, images: list[int], mixed: bool = False):
    def trainer(images: list[int], **changes) -> RewardTrainer:
        settings = dict(max_steps=3, per_device_train_batch_size=batch, per_device_eval_batch_size=batch) | changes
        args = RewardConfig(
            str(folder / "out"),
            learning_rate=1e-2,
            logging_steps=1,
            mean_reward_coefficient=0.5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **trainer_arguments,
            **settings,
        )
        rows, held_out = preference_rows(images), preference_rows([1] * 5)
        return RewardTrainer(model, args, train_dataset=rows, eval_dataset=held_out)

    first = trainer(images)
    first.train()
    evaluation = first.evaluate()
    logs = [entry for entry in first.state.log_history if "loss" in entry]
    report = {
        "losses": [entry["loss"] for entry in logs],
        "margins": [entry["margin"] for entry in logs],
        "evaluation": {key: value for key, value in evaluation.items() if "reward" in key or key in WHOLE},
    }
    if mixed:
        # One row of four has no image: whatever the order, one of two processes meets it while the other has one.
        trainer([0, 1, 1, 1], max_steps=2, per_device_train_batch_size=1).train()
        report["mixed_batches_train"] = True
    return first, report
