# /// script
# dependencies = ["trl-vlm[eval,quantization]"]
# ///
"""Online DPO (2407.02477) on prompts of your own: the policy replies twice, and a judge says which reply is better.

With a judge on an OpenAI-compatible server (or `--reward_model`, the folder of a reward model):

    accelerate launch --config_file accelerate_configs/zero2.yaml examples/online_dpo.py \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name prompts.parquet --evaluation_dataset test.jsonl \
        --endpoint http://localhost:8000/v1 --judge_model my-judge --max_requests 20000

In the small world, on a CPU in minutes, with a reward model of `examples/reward_model.py`:

    python examples/online_dpo.py --model_name_or_path outputs/world/model --use_peft False --learning_rate 1e-3 \
        --dataset_name outputs/world/prompts.parquet --evaluation_dataset outputs/world/test.parquet \
        --reward_model outputs/reward_model --per_device_train_batch_size 32 --max_new_tokens 48 --max_reply_tokens 48

Rows: `prompt`, `images` (docs/data.md); with `--offline_share 0.5` (mixed DPO) also `chosen` and `rejected`. Every
option of `Judged`, of the judge and of `DPOConfig` is a flag.
"""

import logging
from dataclasses import field, make_dataclass

from accelerate import PartialState
from trl import ModelConfig

from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.evaluation import check_scorable_rows
from trl_vlm.pairs import DatasetPairs, Judged, MixedPairs
from trl_vlm.scripts.arguments import refusals, script_parser
from trl_vlm.scripts.evaluation import scored
from trl_vlm.scripts.inputs import check_address, check_first_row, rows_of
from trl_vlm.scripts.job import options_of, prepared
from trl_vlm.scripts.sources import source_arguments, source_from

logger = logging.getLogger("online_dpo")

DEFAULTS = {
    "learning_rate": 1e-6,  # from the range that the paper searches, with LoRA
    "num_train_epochs": 3,
    "total_batch_size": 32,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "cosine",
    "max_length": None,  # never cut image tokens
    "freeze_vision_tower": True,
    "use_peft": True,
    "lora_target_modules": ["language-model"],  # never the vision tower
    "lora_r": 128,
    "lora_alpha": 256,
    "save_total_limit": 1,
    "output_dir": "outputs/online_dpo",
}
MORE_OPTIONS = [
    (
        "offline_share",
        float,
        field(default=0.0, metadata={"help": "Share of rows whose own pair is used: mixed DPO."}),
    ),
    ("evaluation_dataset", str, field(default=None, metadata={"help": "Rows with `objects` or `answer`."})),
    ("max_reply_tokens", int, field(default=512, metadata={"help": "Longest reply of the evaluation."})),
]


def main() -> None:
    options = make_dataclass("Options", MORE_OPTIONS, bases=(source_arguments(Judged, DPOConfig),))
    parser = script_parser(options, DPOConfig, ModelConfig)
    parser.set_defaults(**DEFAULTS)
    script, training, model = options_of(parser)
    with refusals():
        test = rows_of(script.evaluation_dataset, "evaluation_dataset")
        check_first_row(test, "ppo", "evaluation_dataset", columns=("objects", "answer"))
        check_scorable_rows(test)
        if script.endpoint is not None:
            check_address(script.endpoint, "endpoint")
        source = source_from(Judged, script, DPOConfig, training.seed)
        if script.offline_share:
            source = MixedPairs(DatasetPairs(), source, probability=script.offline_share, seed=training.seed)
    job = prepared(script, training, model, purpose="dpo" if script.offline_share else "ppo", unit="pairs")
    if job is not None:
        job.train(DPOTrainer(model.model_name_or_path, pair_source=source, **job.trainer_arguments))
    if PartialState().is_main_process and not script.dry_run:
        for name, folder in (("before", model.model_name_or_path), ("after", training.output_dir)):
            scores = scored(folder, test, script.max_reply_tokens)
            logger.info("%s: %s", name, ", ".join(f"{metric} {value:.3f}" for metric, value in scores.items()))


if __name__ == "__main__":
    main()
