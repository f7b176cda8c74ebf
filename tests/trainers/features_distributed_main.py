"""What `tests.distributed.launch` runs: DPO, or PPO on one base, with kept image features and without.

It reports the losses, and how many images went through the vision tower of each process.
"""

from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from tests.encoded_images import watched
from tests.families import load_processor
from tests.preference_rows import preference_rows
from tests.trainers.ppo.helpers import lora, rows, settings
from trl_vlm import DPOConfig, DPOTrainer, PPOTrainer

REPORTED = ("loss", "grad_norm", "ppo/score", "ppo/kl", "ppo/value_loss")
OPTIMIZER = {"optim": "sgd", "learning_rate": 0.3}
# GiB of features, and whether the last process may keep some: what it always misses, the others encode with it.
RUNS = {"kept": (1.0, True), "each time": (0.0, True), "missed by one": (1.0, False)}


def make(method: str, folder: Path, model: str, reward_model: str, images: list[int], options: dict[str, Any]) -> Any:
    """Two processes with two rows each; PPO passes twice over each of two rollouts."""
    if method == "DPO":
        fixed = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none"}
        return DPOTrainer(
            model,
            args=DPOConfig(str(folder), save_strategy="no", max_length=None, **OPTIMIZER, **fixed, **options),
            train_dataset=preference_rows(images),
            processing_class=load_processor(model),
            peft_config=lora(target_modules="language-model", exclude_modules=None),
        )
    fixed = {"max_steps": 4, "num_ppo_epochs": 2, "check_pixels": False, "shuffle_dataset": False, "share_base": True}
    return PPOTrainer(
        model,
        args=settings(folder, generation_kwargs={"do_sample": False}, **OPTIMIZER, **fixed, **options),
        train_dataset=rows(images),
        peft_config=lora(target_modules="language-model"),
        reward_model=reward_model,
    )


def main(
    folder: Path, trainer_arguments: dict[str, Any], model: str, reward_model: str, images: list[int], runs: list[list]
) -> tuple[Any, dict[str, Any]]:
    report: dict[str, Any] = {}
    trainer = None
    for method, name in runs:
        gibibytes, last_keeps = RUNS[name]
        options = {**trainer_arguments, "image_feature_cache": gibibytes}
        trainer = make(method, folder / f"{method} {name}", model, reward_model, images, options)
        if not last_keeps and trainer.accelerator.is_last_process:
            trainer._image_features.limit = 0
        with watched(trainer.model) as passes:
            trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        logs = {key: [step[key] for step in steps if key in step] for key in REPORTED if key in steps[0]}
        report[f"{method} {name}"] = {"logs": logs, "images": gather_object([len(passes.rows())])}
    return trainer, report
