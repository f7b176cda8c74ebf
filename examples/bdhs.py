# /// script
# dependencies = ["trl-vlm[bdhs,eval,quantization]"]
# ///
"""BDHS (2407.02477) on instruction data of your own: pairs made once, DPO on them, CHAIR or POPE before and after.

The model completes each reference reply while most of the image is hidden from it; what it makes up becomes the
rejected reply. Pairs are written to `<output_dir>/pairs`, resumably and on any number of processes:

    accelerate launch --config_file accelerate_configs/ddp.yaml examples/bdhs.py \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name sft.parquet --evaluation_dataset test.jsonl

In the small world, on a CPU in minutes (nine image tokens; the encoder of the gate is downloaded):

    python -m trl_vlm.testbed.files outputs/world
    python examples/bdhs.py --model_name_or_path outputs/world/model --use_peft False --learning_rate 1e-3 \
        --dataset_name outputs/world/sft.parquet --evaluation_dataset outputs/world/test.parquet --mask_ratio 0.95 \
        --num_train_epochs 2 --per_device_train_batch_size 32 --max_new_tokens 48 --max_reply_tokens 48

Rows: `prompt`, `completion`, `images` (docs/data.md). Every option of `BDHS` and `DPOConfig` is a flag. For pairs that
the current policy makes at every step: `python -m trl_vlm.scripts.bdhs`.
"""

import logging
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig

from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.data.io.source import Source
from trl_vlm.evaluation import check_scorable_rows
from trl_vlm.pairs import BDHS, Policy, generating
from trl_vlm.pairs.writer import PairWriter
from trl_vlm.scripts.arguments import model_arguments, refusals, script_parser
from trl_vlm.scripts.evaluation import load_for_replies, scored
from trl_vlm.scripts.inputs import check_first_row, rows_of
from trl_vlm.scripts.job import options_of, prepared
from trl_vlm.scripts.sources import source_arguments, source_from

logger = logging.getLogger("bdhs")

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
    "output_dir": "outputs/bdhs",
}
EVALUATION = [
    ("evaluation_dataset", str, field(default=None, metadata={"help": "Rows with `objects` or `answer`."})),
    ("max_reply_tokens", int, field(default=512, metadata={"help": "Longest reply of the evaluation."})),
]


def written_pairs(script: Any, training: DPOConfig, model: ModelConfig, settings: dict[str, Any]) -> Dataset:
    """The pairs, made by the model as it is before training; a second call reads what the first one wrote."""
    folder = Path(training.output_dir) / "pairs"
    if not folder.exists():
        policy = Policy(*load_for_replies(model.model_name_or_path, **model_arguments(model)))
        source = source_from(BDHS, script, DPOConfig, training.seed)
        with generating(policy.model):
            PairWriter(source, policy, folder, settings, batch_size=32).write(Source(script.dataset_name))
        PartialState().wait_for_everyone()
    return rows_of(str(folder), "dataset_name")


def main() -> None:
    options = make_dataclass("Options", EVALUATION, bases=(source_arguments(BDHS, DPOConfig),))
    parser = script_parser(options, DPOConfig, ModelConfig)
    parser.set_defaults(**DEFAULTS)
    script, training, model = options_of(parser)
    with refusals():
        test = rows_of(script.evaluation_dataset, "evaluation_dataset")
        check_first_row(test, "ppo", "evaluation_dataset", columns=("objects", "answer"))
        check_scorable_rows(test)
    job = prepared(script, training, model, purpose="sft", unit="pairs")
    if job is not None:
        job.folder.claim()  # before the pairs, which depend on the same options
        job.train_dataset = written_pairs(script, training, model, job.folder.settings)
        job.train(DPOTrainer(model.model_name_or_path, **job.trainer_arguments))
    if PartialState().is_main_process and not script.dry_run:
        for name, folder in (("before", model.model_name_or_path), ("after", training.output_dir)):
            scores = scored(folder, test, script.max_reply_tokens)
            logger.info("%s: %s", name, ", ".join(f"{metric} {value:.3f}" for metric, value in scores.items()))


if __name__ == "__main__":
    main()
