"""What `tests.distributed.launch` runs: DPO of a tiny model with a benchmark before and after its steps."""

from pathlib import Path

import trl

from tests.families import load_processor
from tests.trainers.dpo.helpers import rows
from trl_vlm import EvaluationCallback
from trl_vlm.evaluation import BENCHMARKS


def main(folder: Path, trainer_arguments: dict, model: str, data: str):
    args = trl.DPOConfig(
        str(folder / "out"),
        max_steps=1,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        logging_steps=1,
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **trainer_arguments,
    )
    trainer = trl.DPOTrainer(model, args=args, train_dataset=rows((1, 1)), processing_class=load_processor(model))
    # An odd number of questions, so that two processes have different numbers of batches.
    callback = EvaluationCallback(
        trainer, [BENCHMARKS["pope"]], data, every_steps=1, limit=5, batch_size=1, max_new_tokens=4
    )
    before = callback._records(callback.tasks[0])
    trainer.add_callback(callback)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval/pope_accuracy" in entry]
    return trainer, {"replies": [record.reply for record in before], "steps": [entry["step"] for entry in logged]}
