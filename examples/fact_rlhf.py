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

Four stages run in turn: sft, reward, ppo, evaluate (`--stages ppo evaluate` runs some of them). A stage that was
interrupted goes on from its last checkpoint; one that is done is not run again. Options may stand in a YAML file:
`--config run.yaml`.
"""

import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import set_seed
from fact_rlhf_rows import Rows, TestbedRows, UserRows
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from trl_vlm import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer
from trl_vlm.evaluation import Arm, write_report
from trl_vlm.models import freeze_vision_tower, keep_parameter_names, load_processor
from trl_vlm.rewards import FactRLHFReward, RewardModelReward
from trl_vlm.scripts.common import DONE, history, is_done, load_options, train, write_json

logger = logging.getLogger("fact_rlhf")

STAGES = ("sft", "reward", "ppo", "evaluate")
UPDATES_PER_ROLLOUT = 4  # two passes over two mini-batches, as published
READS_FACTS = {"facts": True, "no_facts": False}


@dataclass
class Options:
    """Everything but the model. Options that are not given take the testbed's value or, with a model, the paper's."""

    output_dir: str = field(default="outputs/fact_rlhf", metadata={"help": "Where everything goes."})
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": "Which stages to run."})
    arms: list[str] = field(
        default_factory=lambda: list(READS_FACTS), metadata={"help": "Reward models: `facts`, `no_facts` or both."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of models, rows and training."})
    quick: bool = field(default=False, metadata={"help": "A few steps of everything: for tests."})
    report_to: str = field(default="none", metadata={"help": "Trackers of the trainers, such as `wandb`."})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Save memory; on with a model."})

    world_seed: int = field(default=0, metadata={"help": "Testbed: which world."})
    vision_noise: float = field(
        default=0.6, metadata={"help": "Testbed: extra pixel noise (sd) for the reward model, which then sees badly."}
    )

    sft_dataset: str | None = field(default=None, metadata={"help": "Rows `prompt`, `completion`, `images`."})
    dataset_name: str | None = field(default=None, metadata={"help": "Rows `prompt`, `chosen`, `rejected`, `facts`."})
    prompt_dataset: str | None = field(default=None, metadata={"help": "Rows `prompt`, `images`, `facts`, `answer`."})
    evaluation_dataset: str | None = field(
        default=None, metadata={"help": "Rows `prompt`, `images`, and `objects` (CHAIR) or `answer` yes / no (POPE)."}
    )

    sft_learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate of the sft stage."})
    reward_learning_rate: float | None = field(default=None, metadata={"help": "Of the reward stage."})
    ppo_learning_rate: float | None = field(default=None, metadata={"help": "Of the ppo stage."})
    reward_steps: int | None = field(default=None, metadata={"help": "Optimiser steps of the reward stage."})
    ppo_rollouts: int | None = field(default=None, metadata={"help": "Rollouts of the ppo stage."})
    batch_size: int | None = field(default=None, metadata={"help": "Pairs or replies per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimiser step."})
    kl_coef: float | None = field(default=None, metadata={"help": "Weight of the KL penalty in the reward."})
    length_coefficient: float | None = field(default=None, metadata={"help": "Weight of the length term."})
    missing_end_penalty: float | None = field(default=None, metadata={"help": "What a reply without end pays."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Longest reply in tokens."})

    def __post_init__(self):
        for name, given, known in (("stages", self.stages, STAGES), ("arms", self.arms, READS_FACTS)):
            if not given or not set(given) <= set(known):
                raise ValueError(f"`--{name}` is {given}; choose from {', '.join(known)}.")

    def filled(self, defaults: dict[str, Any]) -> "Options":
        """These options with `defaults` where none was given."""
        return Options(**{k: defaults.get(k) if v is None else v for k, v in asdict(self).items()})


# The paper's values, from its public code where the paper is silent; 512 replies per rollout over 8 devices.
PAPER = {
    "sft_learning_rate": 2e-5,
    "reward_learning_rate": 2e-5,
    "ppo_learning_rate": 3e-5,
    "reward_steps": 200,
    "ppo_rollouts": 560,
    "batch_size": 4,
    "kl_coef": 0.1,
    "length_coefficient": 10.0,
    "missing_end_penalty": 8.0,
    "max_completion_length": 896,
    "gradient_checkpointing": True,
}
TESTBED = {
    "sft_learning_rate": 2e-3,
    "reward_learning_rate": 5e-4,
    "ppo_learning_rate": 3e-4,
    "reward_steps": 200,
    "ppo_rollouts": 24,
    "batch_size": 64,
    "kl_coef": 0.4,
    "length_coefficient": 4.0,
    "missing_end_penalty": 2.0,
    "max_completion_length": 48,
    "gradient_checkpointing": False,
}
QUICK = {"reward_steps": 4, "ppo_rollouts": 2, "batch_size": 8}


class FactRLHF:
    """The stages. Each writes a folder of its own below `output_dir`, and `done.json` into it when it is finished."""

    def __init__(self, options: Options, model: ModelConfig, rows: Rows):
        self.options, self.model, self.rows = options, model, rows
        self.root = Path(options.output_dir)

    def run(self) -> None:
        for stage in STAGES:
            if stage in self.options.stages:
                getattr(self, stage)()

    def sft(self) -> None:
        folder = self.root / "sft"
        if is_done(folder) or self.rows.train_supervised(folder):
            return
        if self.options.sft_dataset is None:
            logger.info("No `--sft_dataset`: %s is the supervised model.", self.model.model_name_or_path)
            return
        trained = self.root / "sft_adapter" if self.model.use_peft else folder
        if not is_done(trained):
            args = SFTConfig(
                learning_rate=self.options.sft_learning_rate,
                max_length=None,  # never cut image tokens
                model_init_kwargs=load_options(self.model),
                **self.shared_arguments(trained),
            )
            trainer = SFTTrainer(
                self.model.model_name_or_path,
                args=args,
                train_dataset=self.rows.supervised(),
                processing_class=load_processor(self.model.model_name_or_path),
                peft_config=get_peft_config(self.model),
            )
            keep_parameter_names(trainer.model)
            freeze_vision_tower(trainer.model)
            train(trainer, trained)
        if self.model.use_peft and PartialState().is_main_process:
            self.merge(trained, folder)
        PartialState().wait_for_everyone()

    def reward(self) -> None:
        folders = {arm: self.root / f"reward_{arm}" for arm in self.options.arms}
        if all(map(is_done, folders.values())):
            return
        pairs, held_out = self.rows.preferences(self.supervised_model)
        for arm, folder in folders.items():
            if is_done(folder):
                continue
            args = RewardConfig(
                learning_rate=self.options.reward_learning_rate,
                max_steps=self.options.reward_steps,
                mean_reward_coefficient=1e-3,
                use_facts=READS_FACTS[arm],
                freeze_vision_tower=True,
                eval_strategy="steps",
                eval_steps=max(1, self.options.reward_steps // 2),
                model_init_kwargs=load_options(self.model),
                **self.shared_arguments(folder) | self.rows.reward_arguments,
            )
            trainer = RewardTrainer(
                model=self.supervised_model,
                args=args,
                train_dataset=pairs,
                eval_dataset=held_out,
                judge_template=self.rows.judge_template,
                peft_config=get_peft_config(self.model),
            )
            train(trainer, folder)

    def ppo(self) -> None:
        processor = load_processor(self.supervised_model, padding_side="left")
        for arm in self.options.arms:
            folder = self.root / f"ppo_{arm}"
            if is_done(folder):
                continue
            reward_folder = self.needed(f"reward_{arm}")
            reward_model = RewardModelReward(
                reward_folder, batch_size=self.options.batch_size, **load_options(self.model)
            )
            reward = FactRLHFReward(
                self.rows.reward(reward_model),
                eos_token_ids=processor.tokenizer.eos_token_id,
                missing_end_penalty=self.options.missing_end_penalty,
                length_coefficient=self.options.length_coefficient,
                max_tokens=self.options.max_completion_length,
            )
            args = PPOConfig(
                learning_rate=self.options.ppo_learning_rate,
                max_steps=UPDATES_PER_ROLLOUT * self.options.ppo_rollouts,
                num_mini_batches=2,
                num_ppo_epochs=2,
                kl_coef=self.options.kl_coef,
                temperature=1.0,
                top_k=0,
                max_completion_length=self.options.max_completion_length,
                freeze_vision_tower=True,
                model_init_kwargs=load_options(self.model),
                # A checkpoint between two rollouts resumes exactly.
                **self.shared_arguments(folder, UPDATES_PER_ROLLOUT) | self.rows.ppo_arguments,
            )
            trainer = PPOTrainer(
                self.supervised_model,
                reward_funcs=reward,
                args=args,
                train_dataset=self.rows.prompts(with_facts=READS_FACTS[arm]),
                processing_class=processor,
                value_model=reward_folder,
                peft_config=get_peft_config(self.model),
            )
            train(trainer, folder)

    def evaluate(self) -> None:
        if not PartialState().is_main_process:
            return
        names = {"supervised model": self.supervised_model}
        names |= {
            f"PPO, {'with' if READS_FACTS[arm] else 'without'} facts": self.needed(f"ppo_{arm}")
            for arm in self.options.arms
        }
        arms = [Arm(name, self.rows.evaluate(folder), history(folder)) for name, folder in names.items()]
        report = write_report(self.root / "report", arms, title="Fact-RLHF", notes=self.notes())
        sys.stdout.write(report.text)
        logger.info("Written to %s", report.markdown.parent)

    # What the stages share

    @property
    def supervised_model(self) -> str:
        """Where PPO and the reward models start: what the sft stage made, or else the given model."""
        folder = self.root / "sft"
        return str(folder) if is_done(folder) or not self.model.model_name_or_path else self.model.model_name_or_path

    def needed(self, name: str) -> str:
        folder = self.root / name
        if not is_done(folder):
            stage = name.split("_")[0]
            raise SystemExit(f"{folder} is not finished: run the stage that makes it (`--stages {stage}`).")
        return str(folder)

    def shared_arguments(self, folder: Path, save_unit: int = 1) -> dict[str, Any]:
        options = self.options
        steps = save_unit if options.quick else 24
        return {
            "output_dir": str(folder),
            "seed": options.seed,
            "per_device_train_batch_size": options.batch_size,
            "per_device_eval_batch_size": options.batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "gradient_checkpointing": options.gradient_checkpointing,
            "logging_steps": save_unit,
            "save_steps": steps,
            "save_total_limit": 1,
            "report_to": options.report_to,
            **self.rows.shared_arguments,
        }

    def merge(self, adapter: Path, folder: Path) -> None:
        """Merge the supervised adapter into its base model: reward model and policy start from plain weights."""
        model = AutoModelForImageTextToText.from_pretrained(self.model.model_name_or_path, dtype=self.model.dtype)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
        load_processor(self.model.model_name_or_path).save_pretrained(folder)
        write_json(folder / DONE, {"merged": str(adapter)})

    def notes(self) -> list[str]:
        options = self.options
        return [f"seed {options.seed}", *self.rows.notes]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options, model = TrlParser((Options, ModelConfig)).parse_args_and_config()
    on_testbed = model.model_name_or_path is None
    defaults = TESTBED if on_testbed else PAPER
    if options.quick:
        defaults = defaults | QUICK
    options = options.filled(defaults)
    set_seed(options.seed)
    rows = (TestbedRows if on_testbed else UserRows)(options, model)
    FactRLHF(options, model, rows).run()


if __name__ == "__main__":
    main()
