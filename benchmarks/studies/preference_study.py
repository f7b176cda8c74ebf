"""What dense_dpo.py, bdhs.py and online_dpo.py share: train several arms from one supervised model, compare them.

Each arm is trained with every learning rate of a small grid. The development split decides which of them is kept, and
only that one is evaluated, once, on scenes that no choice has seen.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset, load_dataset
from trl import ModelConfig, TrlParser, get_peft_config

from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.data.converters import Source
from trl_vlm.evaluation import Arm, write_report
from trl_vlm.pairs import Policy, generating
from trl_vlm.pairs.writer import PairWriter
from trl_vlm.scripts.common import (
    DONE,
    by_split,
    evaluate_rows,
    history,
    is_done,
    load_model,
    load_options,
    load_rows,
    train,
    write_json,
)
from trl_vlm.testbed import SupervisedSettings, World, train_supervised
from trl_vlm.testbed.evaluate import evaluate

logger = logging.getLogger("preference_study")


@dataclass
class Options:
    """Everything but the model. Options that are not given take the testbed's value or, with a model, the paper's."""

    output_dir: str | None = field(default=None, metadata={"help": "Where everything goes."})
    arms: list[str] | None = field(default=None, metadata={"help": "Which arms to train; all by default."})
    seed: int = field(default=0, metadata={"help": "Seed of models, rows and training."})
    quick: bool = field(default=False, metadata={"help": "A few steps of everything: for tests."})
    report_to: str = field(default="none", metadata={"help": "Trackers of the trainers, such as `wandb`."})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Save memory; on with a model."})

    world_seed: int = field(default=0, metadata={"help": "Testbed: which world."})
    supervised_model: str | None = field(
        default=None, metadata={"help": "Testbed: folder of a supervised model, instead of training one."}
    )

    dataset_name: str | None = field(default=None, metadata={"help": "Training rows: a file or a hub dataset."})
    evaluation_dataset: str | None = field(
        default=None, metadata={"help": "Rows `prompt`, `images`, and `objects` (CHAIR) or `answer` yes / no (POPE)."}
    )
    development_dataset: str | None = field(
        default=None, metadata={"help": "The same, to choose among several `--learning_rates`."}
    )

    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Each arm is trained with each; the best on the development split stays."}
    )
    steps: int | None = field(default=None, metadata={"help": "Optimiser steps of each training."})
    pairs: int | None = field(default=None, metadata={"help": "Testbed: training rows."})
    beta: float | None = field(default=None, metadata={"help": "DPO's beta, where no preset sets it."})
    anchor: float | None = field(
        default=None, metadata={"help": "Weight of TRL's `sft` loss on the chosen reply beside the preference loss."}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Pairs per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimiser step."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Longest generated reply in tokens."})


# With a model: from the ranges that appendix A of 2407.02477 searches; it does not say what it chose, nor how long.
ALIGNMENT_STUDY = {
    "learning_rates": [1e-6],
    "steps": 600,
    "beta": 0.1,
    "anchor": 0.0,
    "batch_size": 4,
    "max_completion_length": 512,
    "gradient_checkpointing": True,
}
TESTBED = {
    "learning_rates": [3e-4, 1e-3, 3e-3],
    "steps": 60,
    "pairs": 800,
    "beta": 0.1,
    "anchor": 1.0,
    "batch_size": 32,
    "max_completion_length": 48,
    "gradient_checkpointing": False,
}
QUICK = {"learning_rates": [3e-4], "steps": 2, "pairs": 8, "batch_size": 4}


class Study:
    """Arms that start from one model and differ in how they are trained.

    Args:
        name: Title of the report, and default folder.
        options: See `Options`.
        model: TRL's model options; without a model name, the testbed's.
        arms: What the command line calls each arm, and its title in the report.
    """

    def __init__(self, name: str, options: Options, model: ModelConfig, arms: Mapping[str, str]):
        self.name, self.options, self.model = name, options, model
        unknown = set(options.arms or ()) - set(arms)
        if unknown:
            raise SystemExit(f"`--arms` has {', '.join(sorted(unknown))}; choose from {', '.join(arms)}.")
        self.arms = {arm: title for arm, title in arms.items() if arm in (options.arms or arms)}
        self.root = Path(options.output_dir)
        self.on_testbed = model.model_name_or_path is None
        self.world = World(seed=options.world_seed) if self.on_testbed else None
        self.keep_settings()
        if not self.on_testbed and len(options.learning_rates) > 1 and options.development_dataset is None:
            raise SystemExit("Several `--learning_rates` need a `--development_dataset` to choose among them.")

    def keep_settings(self) -> None:
        """Write down what pairs and trainings depend on, or refuse a folder that was begun with something else."""
        settings = {name: value for name, value in asdict(self.options).items() if name not in MAY_CHANGE}
        settings["model"] = self.model.model_name_or_path
        path = self.root / "settings.json"
        if path.exists():
            before = json.loads(path.read_text())
            changed = [name for name, value in settings.items() if before.get(name) != value]
            if changed:
                raise SystemExit(
                    f"{self.root} was begun with other values of {', '.join(changed)}. Give the same ones, or another "
                    "`--output_dir`."
                )
        elif PartialState().is_main_process:
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
        PartialState().wait_for_everyone()

    def supervised_model(self) -> str:
        """The folder or name of the model that every arm starts from."""
        given = self.options.supervised_model or self.model.model_name_or_path
        if given:
            return given
        folder = self.root / "sft"
        if not is_done(folder):
            small = SupervisedSettings(tower_steps=20, tower_batch=32, steps=20, batch=16)
            settings = small if self.options.quick else None
            seed = self.options.seed
            train_supervised(self.world, folder, model_seed=seed, data_seed=seed, settings=settings)
            write_json(folder / DONE, {})
        return str(folder)

    def run(self, train_arm: Callable[[str, float, Path], Any]) -> None:
        """Train, choose, evaluate, report.

        Args:
            train_arm: Gives the trainer of an arm for a learning rate and a folder.
        """
        for arm in self.arms:
            for rate in self.options.learning_rates:
                folder = self.folder(arm, rate)
                if not is_done(folder):
                    train(train_arm(arm, rate, folder), folder)
        if PartialState().is_main_process:
            self.report()

    def report(self) -> None:
        arms = [Arm("supervised model", self.evaluated(self.supervised_model(), "test"))]
        for arm, title in self.arms.items():
            rate = self.best(arm)
            folder = self.folder(arm, rate)
            arms.append(Arm(f"{title}, lr {rate:g}", self.evaluated(folder, "test"), history(folder)))
        report = write_report(self.root / "report", arms, title=self.name, notes=self.notes())
        sys.stdout.write(report.text)
        logger.info("Written to %s", report.markdown.parent)

    def folder(self, arm: str, rate: float) -> Path:
        return self.root / f"{arm}_{rate:g}"

    def best(self, arm: str) -> float:
        """The learning rate with the best F1 of caption objects, greedy and sampled, on the development split."""
        rates = self.options.learning_rates
        if len(rates) == 1:
            return rates[0]
        return max(rates, key=lambda rate: object_f1(self.evaluated(self.folder(arm, rate), "development")))

    def evaluated(self, folder: str | Path, split: str) -> dict[str, dict[str, float]]:
        """Metrics of a model on the "development" or the "test" split."""
        if not self.on_testbed:
            rows = load_rows(getattr(self.options, SPLITS[split]), SPLITS[split])
            return evaluate_rows(folder, rows, self.options.max_completion_length)
        model, processor = load_model(folder)
        seed = {"development": 7700, "test": 4400}[split] + self.options.seed
        return by_split(evaluate(model, processor, self.world, scenes=20 if self.options.quick else 300, seed=seed))

    def pairs(self, name: str, make_source: Callable[[], Any], rows: Dataset) -> Dataset:
        """Pairs that a source makes of `rows` with the supervised model, written to a folder on the first call.

        Args:
            name: Of the folder.
            make_source: Gives the source; not called if the pairs are there.
            rows: What the source reads.
        """
        folder = self.root / f"pairs_{name}"
        if not folder.exists():
            inputs = self.root / f"rows_{name}.parquet"
            if PartialState().is_main_process:
                rows.to_parquet(inputs)
            PartialState().wait_for_everyone()
            model, processor = load_model(self.supervised_model(), **load_options(self.model))
            with generating(model):
                PairWriter(
                    make_source(),
                    Policy(model, processor),
                    folder,
                    settings=json.loads((self.root / "settings.json").read_text()),
                    batch_size=self.options.generation_batch,
                ).write(Source(str(inputs)))
            PartialState().wait_for_everyone()
        return load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")

    def trainer(self, train_dataset: Any, rate: float, folder: Path, losses: Mapping[str, float], **given: Any) -> Any:
        """Our DPO trainer with what all arms have in common.

        Args:
            train_dataset: Preference rows.
            rate: Learning rate.
            folder: Output folder.
            losses: TRL's loss types and their weights.
            given: Further fields of `DPOConfig`, and arguments of `DPOTrainer`.
        """
        options = self.options
        arguments = {name: given.pop(name) for name in ("pair_source", "callbacks") if name in given}
        config = DPOConfig(
            str(folder),
            loss_type=list(losses),
            loss_weights=list(losses.values()),
            learning_rate=rate,
            max_steps=options.steps,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 10),
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            gradient_checkpointing=options.gradient_checkpointing,
            max_length=None,  # never cut image tokens
            freeze_vision_tower=True,
            seed=options.seed,
            logging_steps=1 if options.quick else 5,
            save_steps=1 if options.quick else 20,
            save_total_limit=1,
            report_to=options.report_to,
            model_init_kwargs=load_options(self.model),
            **({} if torch.cuda.is_available() else {"bf16": False, "use_cpu": True}),
            **given,
        )
        return DPOTrainer(
            self.supervised_model(),
            args=config,
            train_dataset=train_dataset,
            peft_config=get_peft_config(self.model),
            **arguments,
        )

    def notes(self) -> list[str]:
        options = self.options
        rates = ", ".join(f"{rate:g}" for rate in options.learning_rates)
        notes = [
            f"seed {options.seed}; {options.steps} steps of {options.batch_size} pairs",
            f"learning rates tried: {rates}; chosen by the F1 of caption objects on a development split",
        ]
        if self.on_testbed:
            notes += [
                f"testbed, world {options.world_seed}",
                "numbers of a tiny world: they show that the method works, not how well it works on photographs",
            ]
        return notes


# What a folder may be continued with.
MAY_CHANGE = (
    *("output_dir", "arms", "online", "learning_rates", "report_to"),
    *("evaluation_dataset", "development_dataset", "batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "generation_batch"),
)
SPLITS = {"development": "development_dataset", "test": "evaluation_dataset"}


def object_f1(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """Mean F1 of named objects over the splits (precision is 1 - CHAIR_i); POPE accuracy where none has captions."""
    scores = [
        harmonic_mean(1 - values["chair_i"], values["recall"]) for values in metrics.values() if "chair_i" in values
    ]
    scores = scores or [values["pope_accuracy"] for values in metrics.values()]
    return sum(scores) / len(scores)


def harmonic_mean(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0


def parsed(
    options: type, paper: Mapping[str, Any], name: str, testbed: Mapping[str, Any] | None = None
) -> tuple[Any, ModelConfig]:
    """Options and model options of the command line, with the testbed's or the paper's values where none is given.

    Args:
        options: `Options`, or a dataclass that extends it.
        paper: Values with a model.
        name: Default folder below `outputs`.
        testbed: Values on the testbed beside `TESTBED`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options, model = TrlParser((options, ModelConfig)).parse_args_and_config()
    values = TESTBED | (testbed or {}) if model.model_name_or_path is None else paper
    defaults = {"output_dir": f"outputs/{name}", **values}
    if options.quick:
        defaults |= QUICK
    filled = {key: defaults.get(key) if value is None else value for key, value in asdict(options).items()}
    options = type(options)(**filled)
    set_seed(options.seed)
    return options, model
