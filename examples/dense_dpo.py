# /// script
# dependencies = ["trl-vlm[eval,quantization]"]
# ///
"""Dense DPO (RLHF-V, 2312.00849) on corrected replies of your own, and CHAIR or POPE before and after.

The published corrections, and a 7B model with LoRA:

    trl-vlm convert --from rlhf-v --output rlhf_v.parquet
    accelerate launch --config_file accelerate_configs/zero2.yaml examples/dense_dpo.py \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name rlhf_v.parquet --evaluation_dataset test.jsonl

In the small world, on a CPU in minutes:

    python -m trl_vlm.testbed.files outputs/world
    python examples/dense_dpo.py --model_name_or_path outputs/world/model --use_peft False --learning_rate 1e-3 \
        --dataset_name outputs/world/corrections.parquet --evaluation_dataset outputs/world/test.parquet \
        --num_train_epochs 2 --per_device_train_batch_size 32 --max_reply_tokens 48

Rows: `prompt`, `chosen`, `rejected`, `images` (docs/data.md). Every option of `DPOConfig` is a flag, and a key of the
YAML file of `--config`. Given again, the command goes on where it stopped.
"""

import logging
from dataclasses import dataclass, field

from accelerate import PartialState
from trl import ModelConfig

from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.evaluation import check_scorable_rows
from trl_vlm.scripts.arguments import ScriptArguments, refusals, script_parser
from trl_vlm.scripts.evaluation import scored
from trl_vlm.scripts.inputs import check_first_row, rows_of
from trl_vlm.scripts.job import options_of, prepared

logger = logging.getLogger("dense_dpo")

DEFAULTS = {
    "dense_preset": "paper",  # gamma 5, beta 0.5, weighted mean
    "learning_rate": 5e-6,  # LoRA; RLHF-V trained all weights at a tenth of it
    "num_train_epochs": 7,
    "total_batch_size": 32,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "cosine",
    "max_length": None,  # never cut image tokens
    "freeze_vision_tower": True,
    "use_peft": True,
    "lora_target_modules": ["language-model"],  # never the vision tower
    "lora_r": 64,
    "lora_alpha": 128,
    "save_total_limit": 1,
    "output_dir": "outputs/dense_dpo",
}


@dataclass
class Options(ScriptArguments):
    """What the models are evaluated on."""

    evaluation_dataset: str | None = field(
        default=None, metadata={"help": "Rows `prompt`, `images`, and `objects` (CHAIR) or `answer` yes / no (POPE)."}
    )
    max_reply_tokens: int = field(default=512, metadata={"help": "Longest reply of the evaluation."})


def main() -> None:
    parser = script_parser(Options, DPOConfig, ModelConfig)
    parser.set_defaults(**DEFAULTS)
    script, training, model = options_of(parser)
    with refusals():
        test = rows_of(script.evaluation_dataset, "evaluation_dataset")
        check_first_row(test, "ppo", "evaluation_dataset", columns=("objects", "answer"))
        check_scorable_rows(test)
    job = prepared(script, training, model, purpose="dpo", unit="pairs")
    if job is not None:
        job.train(DPOTrainer(model.model_name_or_path, **job.trainer_arguments))
    if PartialState().is_main_process and not script.dry_run:
        for name, folder in (("before", model.model_name_or_path), ("after", training.output_dir)):
            scores = scored(folder, test, script.max_reply_tokens)
            logger.info("%s: %s", name, ", ".join(f"{metric} {value:.3f}" for metric, value in scores.items()))


if __name__ == "__main__":
    main()
