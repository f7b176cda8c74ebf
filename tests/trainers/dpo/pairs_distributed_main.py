"""What `tests.distributed.launch` runs: DPO of a tiny model on pairs that it makes itself."""

from pathlib import Path
from typing import Any

import trl
from accelerate.utils import gather_object
from transformers import AutoModelForImageTextToText

from tests.families import load_processor
from tests.trainers.dpo.helpers import lora, rows
from tests.trainers.dpo.sources import SOURCES
from trl_vlm import DPOConfig, DPOTrainer, PairSourceCallback
from trl_vlm.trainers.dpo.fresh_pairs import current_policy


def make(
    folder: Path,
    trainer_arguments: dict,
    model: str,
    batch: int,
    steps: int,
    adapter: bool,
    kind: tuple = (DPOTrainer, DPOConfig),
    **options: Any,
):
    trainer, config = kind
    args = config(
        str(folder / "out"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-2 if adapter else 1e-3,
        logging_steps=1,
        max_length=None,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **trainer_arguments,
    )
    data = rows((1, 2, 1, 1, 2, 1, 1, 1)).rename_column("chosen", "completion").remove_columns("rejected")
    return trainer(
        # TRL seeds, then loads, then draws the adapter; loading draws other numbers when ZeRO-3 splits what it loads.
        AutoModelForImageTextToText.from_pretrained(model) if adapter else model,
        args=args,
        train_dataset=data,
        processing_class=load_processor(model),
        peft_config=lora() if adapter else None,
        **options,
    )


def logged(trainer: DPOTrainer, *names: str) -> dict[str, list[float]]:
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in entries] for name in names}


def main(
    folder: Path,
    trainer_arguments: dict,
    model: str,
    batch: int,
    source: str,
    steps: int = 4,
    adapter: bool = False,
    undecided: bool = False,
    callback: bool = False,
):
    recorded, setup = SOURCES[source](), (folder, trainer_arguments, model, batch, steps, adapter)
    trainer = make(*setup, pair_source=recorded)
    trainer.train()
    assert trainer._shares and trainer.model.is_gradient_checkpointing
    report = logged(trainer, "loss", "rewards/margins", "pairs/undecided")
    # One list per process of one list per step of pairs.
    steps_of = zip(*gather_object([recorded.said]), strict=True)
    report["pairs"] = [sorted(pair for part in parts for pair in part) for parts in steps_of]
    first = [trainer.train_dataset[int(name.split()[-1])] for name, _ in recorded.said[0]]
    with current_policy(trainer) as policy:
        recorded(first, policy, round=0)
    report["draws of the first step, by the trained policy"] = sorted(
        pair for part in gather_object([recorded.said[-1]]) for pair in part
    )
    if undecided:
        # Of the rows of a step one process has a pair for each and the other for some, or none.
        names = [f"train row {number}" for number in range(5)]
        second = make(*setup, pair_source=SOURCES["greedy"](undecided=names))
        second.train()
        report |= logged(second, "pairs/left_out", "pairs/none")
    if callback:
        recorded = SOURCES[source]()
        third = make(*setup, kind=(trl.DPOTrainer, trl.DPOConfig))
        third.add_callback(PairSourceCallback(recorded, third, batch_size=batch))
        third.train()
        report["callback's losses"] = logged(third, "loss")["loss"]
        replies = [row["rejected"][0]["content"] for row in third.train_dataset]
        report["callback's replies of each process"] = gather_object([replies])
        report["callback's calls of each process"] = gather_object([len(recorded.said)])
    return trainer, report
