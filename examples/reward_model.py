# /// script
# dependencies = ["trl-vlm[quantization]"]
# ///
"""An image-and-facts reward model (Fact-RLHF, 2309.14525) on pairs of your own, with its accuracy on held-out pairs.

The published pairs with COCO captions as facts, and a 7B model with LoRA:

    trl-vlm convert --from llava-human-preference --input llava_7b_v1_preference.json \
        --facts image_to_caption.json --images coco/train2017 --output pairs.parquet
    accelerate launch --config_file accelerate_configs/zero2.yaml examples/reward_model.py \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name pairs.parquet

In the small world, on a CPU in minutes:

    python -m trl_vlm.testbed.files outputs/world
    python examples/reward_model.py --model_name_or_path outputs/world/model --use_peft False --learning_rate 5e-4 \
        --dataset_name outputs/world/pairs.parquet --per_device_train_batch_size 32 --num_train_epochs 4

Rows: `prompt`, `chosen`, `rejected`, `images`, `facts` (docs/data.md). Every option of `RewardConfig` is a flag.
"""

import logging
from dataclasses import dataclass, field

from accelerate import PartialState
from trl import ModelConfig

from trl_vlm import RewardConfig, RewardTrainer
from trl_vlm.rewards import RewardModelReward
from trl_vlm.scripts.arguments import ScriptArguments, model_arguments, script_parser
from trl_vlm.scripts.job import options_of, prepared
from trl_vlm.scripts.plan import plan_of

logger = logging.getLogger("reward_model")

DEFAULTS = {  # as published
    "learning_rate": 2e-5,
    "num_train_epochs": 1,
    "total_batch_size": 32,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0.03,
    "mean_reward_coefficient": 1e-3,
    "freeze_vision_tower": True,
    "use_peft": True,
    "lora_target_modules": ["language-model"],  # never the vision tower
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_task_type": "SEQ_CLS",
    "save_total_limit": 1,
    "output_dir": "outputs/reward_model",
}


@dataclass
class Options(ScriptArguments):
    """How many pairs are held out."""

    held_out: float = field(default=0.05, metadata={"help": "Share of the pairs that the accuracy is measured on."})


def main() -> None:
    parser = script_parser(Options, RewardConfig, ModelConfig)
    parser.set_defaults(**DEFAULTS)
    script, training, model = options_of(parser)
    job = prepared(script, training, model, purpose="reward", unit="pairs")
    if job is None:
        return
    parts = job.train_dataset.train_test_split(test_size=script.held_out, seed=training.seed)
    job.train_dataset = parts["train"]
    logger.info("%d pairs are held out: %s", len(parts["test"]), plan_of(training, len(parts["train"]), "pairs"))
    job.train(RewardTrainer(model.model_name_or_path, **job.trainer_arguments))
    if not PartialState().is_main_process:
        return
    # As a TRL reward function it scores the replies of PPO, GRPO, RLOO and online DPO.
    reward = RewardModelReward(training.output_dir, batch_size=8, **model_arguments(model))
    rows = parts["test"]
    columns = {name: rows[name] for name in ("images", "facts") if name in rows.column_names}
    chosen = reward(prompts=rows["prompt"], completions=rows["chosen"], **columns)
    rejected = reward(prompts=rows["prompt"], completions=rows["rejected"], **columns)
    right = sum(better > worse for better, worse in zip(chosen, rejected, strict=True))
    logger.info("%d of %d held-out pairs are told right", right, len(rows))


if __name__ == "__main__":
    main()
