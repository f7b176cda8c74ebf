"""What dense_dpo.py, bdhs.py and online_dpo.py share: train several arms from one supervised model, compare them.

Each arm is trained with every learning rate of a small grid. The development split decides which of them is kept, and
only that one is evaluated, once, on scenes that no choice has seen.
"""

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
from trl import ModelConfig, get_peft_config

from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.data.converters import Source
from trl_vlm.evaluation import Arm, check_scorable_rows, write_report
from trl_vlm.models.loading import load_generative_processor
from trl_vlm.pairs import Policy, generating
from trl_vlm.pairs.writer import PairWriter
from trl_vlm.scripts.arguments import accumulation, model_arguments, parsed, refusals, script_parser
from trl_vlm.scripts.evaluation import load_for_replies, scored
from trl_vlm.scripts.inputs import check_first_row, check_model, rows_of
from trl_vlm.scripts.run_folder import RunFolder, history
from trl_vlm.testbed import World
from trl_vlm.testbed.benchmark import Scenes
from trl_vlm.testbed.evaluate import evaluate
from trl_vlm.testbed.stages import WorldRows

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
    steps: int | None = field(default=None, metadata={"help": "Optimizer steps of each training."})
    epochs: float | None = field(default=None, metadata={"help": "Passes over the rows, where no steps are given."})
    pairs: int | None = field(default=None, metadata={"help": "Testbed: training rows."})
    beta: float | None = field(default=None, metadata={"help": "DPO's beta, where no preset sets it."})
    anchor: float | None = field(
        default=None, metadata={"help": "Weight of TRL's `sft` loss on the chosen reply beside the preference loss."}
    )
    total_batch_size: int | None = field(default=None, metadata={"help": "Pairs per step on all devices."})
    batch_size: int | None = field(default=None, metadata={"help": "Pairs per device and micro-batch, at most."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Longest generated reply in tokens."})


# With a model: from the ranges that appendix A of 2407.02477 searches, with LoRA; it does not say what it chose.
ALIGNMENT_STUDY = {
    "learning_rates": [1e-6],
    "epochs": 3.0,
    "beta": 0.1,
    "anchor": 0.0,
    "total_batch_size": 32,
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
    "total_batch_size": 32,
    "batch_size": 32,
    "max_completion_length": 48,
    "gradient_checkpointing": False,
}
QUICK = {"learning_rates": [3e-4], "steps": 2, "pairs": 8, "total_batch_size": 4, "batch_size": 4}


class Study:
    """Arms that start from one model and differ in how they are trained.

    Args:
        name: Title of the report, and default folder.
        options: See `Options`.
        model: TRL's model options; without a model name, the testbed's.
        arms: What the command line calls each arm, and its title in the report.
    """

    def __init__(self, name: str, options: Options, model: ModelConfig, arms: Mapping[str, str], purpose: str = "dpo"):
        self.name, self.options, self.model = name, options, model
        unknown = set(options.arms or ()) - set(arms)
        if unknown:
            raise SystemExit(f"`--arms` has {', '.join(sorted(unknown))}; choose from {', '.join(arms)}.")
        self.arms = {arm: title for arm, title in arms.items() if arm in (options.arms or arms)}
        self.root = Path(options.output_dir)
        self.on_testbed = model.model_name_or_path is None
        self.world = World(seed=options.world_seed) if self.on_testbed else None
        self.settings = {name: value for name, value in asdict(options).items() if name not in MAY_CHANGE}
        self.settings |= asdict(model)
        with refusals():
            if not self.on_testbed:
                self.check_rows(purpose)
            RunFolder(self.root, self.settings).claim()

    def check_rows(self, purpose: str) -> None:
        """Refuses a model or rows that could not be used, before the first training."""
        options = self.options
        check_model(self.model.model_name_or_path)
        processor = load_generative_processor(self.model.model_name_or_path)
        check_first_row(rows_of(options.dataset_name, "dataset_name"), purpose, "dataset_name", processor)
        splits = ["evaluation_dataset"]
        if len(options.learning_rates) > 1:
            if options.development_dataset is None:
                raise ValueError("Several `--learning_rates` need a `--development_dataset` to choose among them.")
            splits.append("development_dataset")
        for split in splits:
            rows = rows_of(getattr(options, split), split)
            check_first_row(rows, "ppo", split, processor, columns=("objects", "answer"))
            check_scorable_rows(rows)

    def supervised_model(self) -> str:
        """The folder or name of the model that every arm starts from."""
        given = self.options.supervised_model or self.model.model_name_or_path
        if given:
            return given
        folder = RunFolder(self.root / "sft", self.settings)
        if not folder.is_done:
            rows = WorldRows(self.options.world_seed, self.options.seed, quick=self.options.quick)
            rows.train_supervised(folder.path)
            folder.finish()
        return str(folder.path)

    def run(self, train_arm: Callable[[str, float, Path], Any]) -> None:
        """Train, choose, evaluate, report.

        Args:
            train_arm: Gives the trainer of an arm for a learning rate and a folder.
        """
        for arm in self.arms:
            for rate in self.options.learning_rates:
                folder = RunFolder(self.folder(arm, rate), self.settings | {"learning_rate": rate})
                if not folder.is_done:
                    folder.train(train_arm(arm, rate, folder.path))
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
            rows = rows_of(getattr(self.options, SPLITS[split]), SPLITS[split])
            return {"evaluation": scored(folder, rows, self.options.max_completion_length)}
        model, processor = load_for_replies(folder)
        seed = {"development": 7700, "test": 4400}[split] + self.options.seed
        return evaluate(model, processor, Scenes(self.world, count=20 if self.options.quick else 300, seed=seed))

    def pairs(
        self, name: str, make_source: Callable[[], Any], rows: Dataset, batch_size: int | None = None
    ) -> Dataset:
        """Pairs that a source makes of `rows` with the supervised model, written to a folder on the first call.

        Args:
            name: Of the folder.
            make_source: Gives the source; not called if the pairs are there.
            rows: What the source reads.
            batch_size: Rows at once; None is `generation_batch`.
        """
        folder = self.root / f"pairs_{name}"
        if not folder.exists():
            inputs = self.root / f"rows_{name}.parquet"
            if PartialState().is_main_process:
                rows.to_parquet(inputs)
            PartialState().wait_for_everyone()
            model, processor = load_for_replies(self.supervised_model(), **model_arguments(self.model))
            with generating(model):
                PairWriter(
                    make_source(),
                    Policy(model, processor),
                    folder,
                    settings=self.settings,
                    batch_size=batch_size or self.options.generation_batch,
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
        options, processes = self.options, PartialState().num_processes
        per_device = max(1, min(options.batch_size, options.total_batch_size // processes))
        arguments = {name: given.pop(name) for name in ("pair_source", "callbacks") if name in given}
        config = DPOConfig(
            str(folder),
            loss_type=list(losses),
            loss_weights=list(losses.values()),
            learning_rate=rate,
            max_steps=options.steps or -1,
            num_train_epochs=options.epochs or 1.0,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 10) if options.steps else 0.1,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation(options.total_batch_size, per_device, processes),
            gradient_checkpointing=options.gradient_checkpointing,
            max_length=None,  # never cut image tokens
            freeze_vision_tower=True,
            seed=options.seed,
            logging_steps=1 if options.quick else 5,
            save_steps=1 if options.quick else 20,
            save_total_limit=1,
            report_to=options.report_to,
            model_init_kwargs=model_arguments(self.model),
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
        length = f"{options.steps} steps" if options.steps else f"{options.epochs:g} epochs in steps"
        chosen = (
            "; chosen by the F1 of caption objects on a development split" if len(options.learning_rates) > 1 else ""
        )
        notes = [
            f"seed {options.seed}; {length} of {options.total_batch_size} pairs",
            f"learning rates tried: {rates}{chosen}",
        ]
        if self.on_testbed:
            notes += [
                f"testbed, world {options.world_seed}",
                "numbers of a tiny world: they show that the method works, not how well it works on photographs",
            ]
        return notes


# What a folder may be continued with.
MAY_CHANGE = {
    "output_dir",
    "arms",
    "online",
    "learning_rates",
    "report_to",
    "evaluation_dataset",
    "development_dataset",
}
MAY_CHANGE |= {"batch_size", "gradient_checkpointing", "generation_batch"}
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


def study_options(
    options: type,
    paper: Mapping[str, Any],
    name: str,
    testbed: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
) -> tuple[Any, ModelConfig]:
    """Options and model options of the command line, with the testbed's or the paper's values where none is given.

    Args:
        options: `Options`, or a dataclass that extends it.
        paper: Values with a model.
        name: Default folder below `outputs`.
        testbed: Values on the testbed beside `TESTBED`.
        lora: Values with a model and LoRA beside `paper`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options, model = parsed(script_parser(options, ModelConfig))
    if model.model_name_or_path is None:
        model.dtype = "float32"
        values = TESTBED | (testbed or {})
    else:
        values = {**paper, **((lora or {}) if model.use_peft else {})}
    defaults = {"output_dir": f"outputs/{name}", **values}
    if options.quick:
        defaults |= QUICK
    filled = {key: defaults.get(key) if value is None else value for key, value in asdict(options).items()}
    options = type(options)(**filled)
    set_seed(options.seed)
    return options, model
