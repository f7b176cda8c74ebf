# /// script
# dependencies = ["trl-vlm[eval,quantization]"]
# ///
"""Fact-RLHF (2309.14525) end to end: supervised model, reward models, PPO with a critic, and a report.

On a small world that it makes itself, on a CPU, in minutes:

    accelerate launch examples/fact_rlhf.py

On a model and rows of your own (columns: docs/data.md), with any file of accelerate_configs/:

    accelerate launch --config_file accelerate_configs/zero2.yaml examples/fact_rlhf.py \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --sft_dataset sft.jsonl --dataset_name pairs.jsonl \
        --prompt_dataset prompts.jsonl --evaluation_dataset test.jsonl \
        --use_peft --lora_target_modules all-linear --load_in_4bit --output_dir outputs/llava

Four stages run in turn: sft, reward, ppo, evaluate (`--stages ppo evaluate` runs some of them). Before the first one,
every file is checked and the plan is printed. A stage that was interrupted goes on from its last checkpoint; one that
is done is not run again, and none goes on with other settings. Options may stand in a YAML file: `--config run.yaml`.
"""

import trl_vlm.scripts.quiet  # noqa: F401  first: libraries talk while they are imported

# isort: split
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_from_disk
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from trl import ModelConfig, TrlParser, get_peft_config

from trl_vlm import EvaluationCallback, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl_vlm.data import JudgeTemplate
from trl_vlm.evaluation.summary import Evaluation
from trl_vlm.models import load_processor
from trl_vlm.rewards import FactRLHFReward, RewardModelReward
from trl_vlm.scripts.arguments import accumulation, model_arguments, parsed, refusals, script_parser
from trl_vlm.scripts.comparison import compare, reply
from trl_vlm.scripts.console import ReadableProgress, heading
from trl_vlm.scripts.inputs import bytes_to_write, check_folder, check_model
from trl_vlm.scripts.plan import plan_of
from trl_vlm.scripts.run_folder import RunFolder
from trl_vlm.scripts.side_by_side import side_by_side
from trl_vlm.scripts.stage_rows import FileRows
from trl_vlm.testbed.stages import WorldRows
from trl_vlm.testbed.stream import cores

logger = logging.getLogger("fact_rlhf")

STAGES = ("sft", "reward", "ppo", "evaluate")
MINI_BATCHES, PPO_EPOCHS = 2, 2  # two passes over two mini-batches, as published
UPDATES_PER_ROLLOUT = MINI_BATCHES * PPO_EPOCHS
READS_FACTS = {"facts": True, "no_facts": False}
SUPERVISED = "supervised model"
PARTS = ("train", "evaluation")  # of the pairs


def option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """Everything but the model. Options that are not given take the testbed's value or, with a model, the paper's."""

    output_dir: str = option("Where everything goes.", "outputs/fact_rlhf")
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": "Which stages to run."})
    arms: list[str] = field(
        default_factory=lambda: list(READS_FACTS), metadata={"help": "Reward models: `facts`, `no_facts` or both."}
    )
    seed: int = option("Seed of models, rows and training.", 0)
    quick: bool = option("A few steps of everything: for tests.", False)
    dry_run: bool = option("Check everything, print the plan, and stop.", False)
    report_to: str = option("Trackers of the trainers, such as `wandb`.", "none")
    gradient_checkpointing: bool | None = option("Save memory; on with a model.")
    save_steps: int = option("Steps between checkpoints; of PPO, rounded up to whole rollouts.", 24)

    side_by_side: bool | None = option("Testbed: one process for each arm. By default, on a CPU with a core for each.")
    world_seed: int = option("Testbed: which world.", 0)
    vision_noise: float = option("Testbed: extra pixel noise (sd) for the reward model: nearly blind.", 1.5)

    sft_dataset: str | None = option("Rows `prompt`, `completion`, `images`: a file, a folder or a hub id.")
    dataset_name: str | None = option("Rows `prompt`, `chosen`, `rejected`, `images`, `facts`.")
    prompt_dataset: str | None = option("Rows `prompt`, `images`, `facts`, `answer`.")
    evaluation_dataset: str | None = option("Rows `prompt`, `images`, `objects` (CHAIR) or `answer` yes / no (POPE).")

    batch_size: int | None = option("Pairs or replies per device and micro-batch, at most.")
    sft_batch_size: int | None = option("Rows per step on all devices.")
    sft_learning_rate: float | None = option("Peak learning rate of the sft stage.")
    sft_epochs: float = option("Passes over `--sft_dataset`.", 1.0)
    reward_batch_size: int | None = option("Pairs per step on all devices.")
    reward_learning_rate: float | None = option("Of the reward stage.")
    reward_epochs: float = option("Passes over `--dataset_name`.", 1.0)
    reward_steps: int | None = option("Optimizer steps of the reward stage, in place of epochs.")
    rollout_size: int | None = option("Replies per rollout on all devices.")
    ppo_learning_rate: float | None = option("Of the ppo stage.")
    ppo_epochs: float = option("Passes over `--prompt_dataset`.", 4.0)
    ppo_rollouts: int | None = option("Rollouts of the ppo stage, in place of epochs.")
    kl_coef: float | None = option("Weight of the KL penalty in the reward.")
    length_coefficient: float | None = option("Weight of the length term.")
    missing_eos_penalty: float | None = option("What a reply without end pays.")
    max_completion_length: int | None = option("Longest reply in tokens.")

    def __post_init__(self):
        for name, given, known in (("stages", self.stages, STAGES), ("arms", self.arms, READS_FACTS)):
            if not given or not set(given) <= set(known):
                raise ValueError(f"`--{name}` is {' '.join(given)}; choose from {', '.join(known)}.")


# The paper's values, from its public code where the paper is silent. Its reward model and policy are LoRA of rank 64.
PAPER = {
    "batch_size": 4,
    "sft_batch_size": 128,
    "sft_learning_rate": 1e-4,
    "reward_batch_size": 32,
    "reward_learning_rate": 2e-5,
    "rollout_size": 512,
    "ppo_learning_rate": 3e-5,
    "kl_coef": 0.1,
    "length_coefficient": 10.0,
    "missing_eos_penalty": 8.0,
    "max_completion_length": 896,
    "gradient_checkpointing": True,
}
# All weights: the published rate of LLaVA's supervised stage, and a tenth of what LoRA needs for the others.
ALL_WEIGHTS = {"sft_learning_rate": 2e-5, "reward_learning_rate": 2e-6, "ppo_learning_rate": 3e-6}
TESTBED = {
    "batch_size": 64,
    "reward_batch_size": 32,
    "reward_learning_rate": 5e-4,
    "reward_steps": 200,
    "rollout_size": 128,
    "ppo_learning_rate": 3e-4,
    "ppo_rollouts": 24,
    "kl_coef": 0.4,
    "length_coefficient": 4.0,
    "missing_eos_penalty": 2.0,
    "max_completion_length": 48,
    "gradient_checkpointing": False,
}
QUICK = {"reward_steps": 4, "ppo_rollouts": 2, "batch_size": 8, "reward_batch_size": 8, "rollout_size": 16}

# Which options shape what a stage makes; a stage also depends on those before it.
COMMON = ("seed", "quick", "world_seed")
SHAPED_BY = {
    "sft": ("sft_batch_size", "sft_learning_rate", "sft_epochs"),
    "reward": ("vision_noise", "reward_batch_size", "reward_learning_rate", "reward_epochs", "reward_steps"),
    "ppo": (
        *("rollout_size", "ppo_learning_rate", "ppo_epochs", "ppo_rollouts", "kl_coef", "length_coefficient"),
        *("missing_eos_penalty", "max_completion_length"),
    ),
}
DATA = {"sft": "sft_dataset", "reward": "dataset_name", "ppo": "prompt_dataset", "evaluate": "evaluation_dataset"}


class Rows(Protocol):
    """What the stages need to know of their data: `FileRows`, or the testbed's `WorldRows`."""

    about: Mapping[str, str]  # what each stage does, for a person
    judge_template: JudgeTemplate | None
    arguments: dict[str, dict[str, Any]]  # of the trainer's configuration, by stage
    notes: list[str]

    def check(self, stage: str) -> Any: ...
    def count(self, stage: str) -> int | None: ...
    def preferences(self, model: str) -> tuple[Dataset, Dataset]: ...
    def reward(self, reward_model: Any) -> Any: ...
    def prompts(self) -> Dataset: ...
    def evaluation(self, folder: Path) -> Evaluation: ...


class FactRLHF:
    """The stages. Each writes a folder of its own below `output_dir`, and `done.json` into it when it is finished."""

    def __init__(self, options: Options, model: ModelConfig, rows: Rows):
        self.options, self.model, self.rows = options, model, rows
        self.root = Path(options.output_dir)
        self.data: dict[str, Any] = {}  # what tells the rows of a stage from others
        self.trains_supervised = isinstance(rows, WorldRows) or options.sft_dataset is not None

    def run(self) -> None:
        arms = self.arms_apart()
        if not arms:
            for stage in self.stages:
                self.begin(stage)
                getattr(self, stage)()
            return
        own = [stage for stage in self.stages if stage != "sft"]
        alone = [replace(self.options, arms=[arm], stages=own, side_by_side=False) for arm in arms]
        parts = {arm: partial(arm_training, options, self.model) for arm, options in zip(arms, alone, strict=True)}
        with side_by_side(parts) as begin_arms:
            if "sft" in self.stages:
                self.begin("sft")
                self.sft()
            for stage in own[:-1] if "evaluate" in own else own:
                self.begin(stage)
            logger.info("\n%s at the same time, each on a core of its own:", " and ".join(arms))
            _ = self.evaluation  # written once, for all, as are the pairs
            if not all(self.folder("reward", arm).is_done for arm in arms if "reward" in own):
                self.draw_pairs()
            begin_arms()
            if "evaluate" in own:
                self.reply([SUPERVISED])  # while they train
        if "evaluate" in own:
            self.begin("evaluate")
            self.evaluate()

    def train_arm(self) -> None:
        """One reward model, its policy, and the policy's replies."""
        for stage in ("reward", "ppo"):
            if stage in self.options.stages:
                logger.info(stage)
                getattr(self, stage)()
        if "evaluate" in self.options.stages:
            logger.info("replies")
            self.reply(self.options.arms)

    def begin(self, stage: str) -> None:
        heading(self.stages.index(stage) + 1, len(self.stages), stage, self.rows.about[stage])

    def arms_apart(self) -> list[str]:
        """The arms that train at the same time, each in a process of its own; [] where they train in turn."""
        stages = [stage for stage in ("reward", "ppo") if stage in self.stages]
        left = [arm for arm in self.options.arms if not all(self.folder(stage, arm).is_done for stage in stages)]
        is_possible = isinstance(self.rows, WorldRows) and PartialState().num_processes == 1 and len(left) > 1
        pays = cores() > 1 and not torch.cuda.is_available()
        wanted = pays if self.options.side_by_side is None else self.options.side_by_side
        return left if is_possible and wanted else []

    @property
    def stages(self) -> list[str]:
        return [
            stage for stage in STAGES if stage in self.options.stages and (stage != "sft" or self.trains_supervised)
        ]

    def check(self) -> None:
        """Everything that any of the stages needs, before the first one; prints the plan."""
        made = {f"{stage}_{arm}" for stage in self.stages for arm in self.options.arms}
        for stage in self.stages:
            self.data[stage] = self.rows.check(stage)
            for arm in self.options.arms if stage in ("reward", "ppo") else [""]:
                if stage != "evaluate":
                    self.folder(stage, arm).check()
                needed = {"ppo": f"reward_{arm}"}.get(stage)
                if needed and needed not in made:
                    self.needed(needed)
        if "evaluate" in self.stages and "ppo" not in self.stages:
            for arm in self.options.arms:
                self.needed(f"ppo_{arm}")
        trainings = sum(len(self.options.arms) if stage in ("reward", "ppo") else 1 for stage in self.stages)
        model = self.model.model_name_or_path
        needed = trainings * bytes_to_write(model, adapter=self.model.use_peft, checkpoints=2) if model else 0
        check_folder(self.root, needed)
        for stage in self.stages:
            logger.info("%s: %s", stage, self.plan(stage))

    def plan(self, stage: str) -> str:
        rows = self.rows.count(stage) if stage != "evaluate" else None
        if rows is None:
            return "supervised model and policies on fresh rows" if stage == "evaluate" else "in the small world"
        make = {"sft": self.sft_arguments, "reward": self.reward_arguments, "ppo": self.ppo_arguments}[stage]
        unit = {"sft": "rows", "reward": "pairs", "ppo": "replies"}[stage]
        return str(plan_of(make(self.root / stage), rows, unit))

    def sft(self) -> None:
        folder = self.folder("sft")
        if folder.is_done:
            return
        folder.claim()
        if isinstance(self.rows, WorldRows):
            self.rows.train_supervised(folder.path, [ReadableProgress()])
            folder.finish()
            return
        trained = RunFolder(self.root / "sft_adapter", folder.settings) if self.model.use_peft else folder
        if not trained.is_done:
            trainer = SFTTrainer(
                self.model.model_name_or_path,
                args=self.sft_arguments(trained.path),
                train_dataset=self.rows.supervised(),
                peft_config=get_peft_config(self.model),
            )
            trained.train(trainer)
        if self.model.use_peft:
            if PartialState().is_main_process:
                self.merge(trained.path, folder.path)
            folder.finish(merged=str(trained.path))

    def reward(self) -> None:
        folders = {arm: self.folder("reward", arm) for arm in self.options.arms}
        if all(folder.is_done for folder in folders.values()):
            return
        drawn = self.pairs_folder
        if drawn.is_done:
            drawn.check()
            pairs, held_out = (load_from_disk(drawn.path / part, keep_in_memory=True) for part in PARTS)
        else:
            pairs, held_out = self.rows.preferences(self.supervised_model)
        for arm, folder in folders.items():
            if folder.is_done:
                continue
            args = self.reward_arguments(folder.path, use_facts=READS_FACTS[arm])
            args.eval_steps = max(1, plan_of(args, len(pairs), "pairs").steps // 2)
            trainer = RewardTrainer(
                model=self.supervised_model,
                args=args,
                train_dataset=pairs,
                eval_dataset=held_out,
                judge_template=self.rows.judge_template,
                peft_config=get_peft_config(self.model),
            )
            folder.train(trainer)

    def draw_pairs(self) -> None:
        """Draws the pairs of both arms with all cores, while neither arm trains."""
        folder = self.pairs_folder
        folder.check()
        if folder.is_done or not isinstance(self.rows, WorldRows):
            return
        folder.claim()
        disable_progress_bars()
        for part, rows in zip(PARTS, self.rows.preferences(self.supervised_model, cores()), strict=True):
            rows.save_to_disk(folder.path / part)
        enable_progress_bars()
        folder.finish()

    def ppo(self) -> None:
        processor = load_processor(self.supervised_model, padding_side="left")
        for arm in self.options.arms:
            folder = self.folder("ppo", arm)
            if folder.is_done:
                continue
            reward_folder = self.needed(f"reward_{arm}")
            reward_model = RewardModelReward(
                reward_folder, batch_size=self.options.batch_size, **model_arguments(self.model)
            )
            reward = FactRLHFReward(
                self.rows.reward(reward_model),
                eos_token_ids=processor.tokenizer.eos_token_id,
                missing_eos_penalty=self.options.missing_eos_penalty,
                length_coefficient=self.options.length_coefficient,
                max_tokens=self.options.max_completion_length,
            )
            prompts = self.rows.prompts()
            if not READS_FACTS[arm] and "facts" in prompts.column_names:
                prompts = prompts.remove_columns("facts")
            trainer = PPOTrainer(
                self.supervised_model,
                reward_funcs=reward,
                args=self.ppo_arguments(folder.path),
                train_dataset=prompts,
                processing_class=processor,
                value_model=reward_folder,
                peft_config=get_peft_config(self.model),
            )
            if isinstance(self.rows, WorldRows) or self.options.evaluation_dataset:
                parts, every = self.evaluation.benchmarks[:1], trainer.args.save_steps
                watched = EvaluationCallback(trainer, parts, self.evaluation.data, every_steps=every, limit=100)
                trainer.add_callback(watched)
            folder.train(trainer)

    def evaluate(self) -> None:
        """Compare the policies with the model that they started from, and say what changed."""
        models = self.models([SUPERVISED, *sorted(self.options.arms)])  # the arm with facts first
        notes, batch_size = [f"seed {self.options.seed}", *self.rows.notes], self.options.batch_size
        with refusals():  # replies of a model that has changed since
            text = compare(models, self.evaluation, self.root, title="Fact-RLHF", notes=notes, batch_size=batch_size)
        if PartialState().is_main_process:
            sys.stdout.write(f"\n{text}")

    def models(self, arms: Sequence[str]) -> dict[str, str]:
        """What a report calls the policies of the arms, or the model that they start from, to their folders."""
        named = {SUPERVISED: SUPERVISED, "facts": "PPO, with facts", "no_facts": "PPO, without facts"}
        folders = (self.supervised_model if arm == SUPERVISED else self.needed(f"ppo_{arm}") for arm in arms)
        return {named[arm]: folder for arm, folder in zip(arms, folders, strict=True)}

    def reply(self, arms: Sequence[str]) -> None:
        """Makes the replies of some of the models that `evaluate` compares."""
        with refusals():
            reply(self.models(arms), self.evaluation, self.root, batch_size=self.options.batch_size)

    @cached_property
    def evaluation(self) -> Evaluation:
        """What the policies are measured on; PPO watches a part of it."""
        with PartialState().main_process_first():
            return self.rows.evaluation(self.root / "scenes")

    # Configurations of the trainers

    def sft_arguments(self, folder: Path) -> SFTConfig:
        return SFTConfig(
            learning_rate=self.options.sft_learning_rate,
            num_train_epochs=self.options.sft_epochs,
            max_length=None,  # never cut image tokens
            freeze_vision_tower=True,
            **self.shared_arguments("sft", folder, self.options.sft_batch_size),
        )

    def reward_arguments(self, folder: Path, use_facts: bool = True) -> RewardConfig:
        return RewardConfig(
            learning_rate=self.options.reward_learning_rate,
            max_steps=self.options.reward_steps or -1,
            num_train_epochs=self.options.reward_epochs,
            mean_reward_coefficient=1e-3,
            use_facts=use_facts,
            freeze_vision_tower=True,
            eval_strategy="steps",
            **self.shared_arguments("reward", folder, self.options.reward_batch_size),
        )

    def ppo_arguments(self, folder: Path) -> PPOConfig:
        options = self.options
        return PPOConfig(
            learning_rate=options.ppo_learning_rate,
            max_steps=UPDATES_PER_ROLLOUT * options.ppo_rollouts if options.ppo_rollouts else -1,
            num_train_epochs=options.ppo_epochs,
            num_mini_batches=MINI_BATCHES,
            num_ppo_epochs=PPO_EPOCHS,
            kl_coef=options.kl_coef,
            temperature=1.0,
            top_k=0,
            max_completion_length=options.max_completion_length,
            freeze_vision_tower=True,
            # A checkpoint between two rollouts resumes exactly.
            **self.shared_arguments("ppo", folder, options.rollout_size // MINI_BATCHES, UPDATES_PER_ROLLOUT),
        )

    def shared_arguments(self, stage: str, folder: Path, batch: int, unit: int = 1) -> dict[str, Any]:
        """What all stages have in common; `batch` is that of a step on all devices, `unit` the steps of a rollout."""
        options, processes = self.options, PartialState().num_processes
        per_device = max(1, min(options.batch_size, batch // processes))
        return {
            "output_dir": str(folder),
            "seed": options.seed,
            "per_device_train_batch_size": per_device,
            "per_device_eval_batch_size": options.batch_size,
            "gradient_accumulation_steps": accumulation(batch, per_device, processes),
            "gradient_checkpointing": options.gradient_checkpointing,
            "logging_steps": unit,
            "save_steps": unit if options.quick else unit * math.ceil(options.save_steps / unit),
            "save_total_limit": 1,
            "report_to": options.report_to,
            "model_init_kwargs": model_arguments(self.model),
            **self.rows.arguments[stage],
        }

    # Folders

    def folder(self, stage: str, arm: str = "") -> RunFolder:
        """The folder of a stage, with everything that shapes what the stage makes."""
        settings = {name: getattr(self.options, name) for name in (*COMMON, *SHAPED_BY[stage])}
        settings |= asdict(self.model) | {"rows": self.data.get(stage)}
        after = {"sft": None, "reward": self.root / "sft", "ppo": self.root / f"reward_{arm}"}[stage]
        return RunFolder(self.root / "_".join(filter(None, (stage, arm))), settings, after)

    @property
    def pairs_folder(self) -> RunFolder:
        """Where pairs are that both arms train on."""
        settings = {name: getattr(self.options, name) for name in (*COMMON, "vision_noise")}
        return RunFolder(self.root / "pairs", settings, self.root / "sft")

    @property
    def supervised_model(self) -> str:
        """Where PPO and the reward models start: what the sft stage made, or else the given model."""
        return self.needed("sft") if self.trains_supervised else self.model.model_name_or_path

    def needed(self, name: str) -> str:
        if not RunFolder(self.root / name, {}).is_done:
            stage = name.split("_")[0]
            raise SystemExit(f"{self.root / name} is not finished: run the stage that makes it (`--stages {stage}`).")
        return str(self.root / name)

    def merge(self, adapter: Path, folder: Path) -> None:
        """Merges the supervised adapter into its base model: reward model and policy start from plain weights."""
        model = AutoModelForImageTextToText.from_pretrained(self.model.model_name_or_path, dtype=self.model.dtype)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
        load_processor(self.model.model_name_or_path).save_pretrained(folder)


def make_parser(prog: str | None = None) -> TrlParser:
    return script_parser(Options, ModelConfig, prog=prog)


def arm_training(options: Options, model: ModelConfig) -> Callable[[], None]:
    """What a process does that trains one arm; its prompts are drawn before, while it waits for the others."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("trl_vlm").setLevel(logging.WARNING)  # the plan has said what trains
    logging.getLogger("trl_vlm.scripts").setLevel(logging.INFO)
    torch.set_num_threads(max(1, torch.get_num_threads() // len(READS_FACTS)))
    pipeline = pipeline_of(options, model)
    if "ppo" in options.stages:
        pipeline.rows.prompts()
    return pipeline.train_arm


def pipeline_of(options: Options, model: ModelConfig) -> FactRLHF:
    set_seed(options.seed)
    if model.model_name_or_path is None:
        transformers.utils.logging.disable_progress_bar()  # of loading and saving, which take no time here
        model.dtype = "float32"
        return FactRLHF(
            options, model, WorldRows(options.world_seed, options.seed, options.vision_noise, options.quick)
        )
    check_model(model.model_name_or_path)
    rows = FileRows(
        {stage: (name, getattr(options, name)) for stage, name in DATA.items()},
        model.model_name_or_path,
        facts="facts" in options.arms,
        seed=options.seed,
        max_new_tokens=options.max_completion_length,
    )
    return FactRLHF(options, model, rows)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options, model = parsed(make_parser())
    defaults = TESTBED if model.model_name_or_path is None else PAPER if model.use_peft else PAPER | ALL_WEIGHTS
    if options.quick:
        defaults = defaults | QUICK
    options = Options(**{k: defaults.get(k) if v is None else v for k, v in asdict(options).items()})
    with refusals():
        pipeline = pipeline_of(options, model)
        pipeline.check()
    if not options.dry_run:
        pipeline.run()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
