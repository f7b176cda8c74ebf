# /// script
# dependencies = ["trl-vlm[eval,quantization]"]
# ///
"""Dense DPO (RLHF-V, 2312.00849) beside plain DPO and beside supervised training on the same corrected replies.

On a small world that it makes itself, on a CPU, in minutes:

    accelerate launch -m benchmarks.studies.dense_dpo

There a supervised model that hallucinates describes pictures, and an oracle corrects the wrong segments, as RLHF-V's
annotators did. On a model and corrected replies of your own (columns: docs/data.md; `trl-vlm convert --from rlhf-v`
makes them from the published ones), with any file of accelerate_configs/:

    accelerate launch --config_file accelerate_configs/zero2.yaml -m benchmarks.studies.dense_dpo \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name rlhf_v.parquet --evaluation_dataset test.jsonl \
        --use_peft --lora_target_modules all-linear --output_dir outputs/llava

An arm that was interrupted goes on from its last checkpoint; one that is done is not trained again.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks.studies.preference_study import Options, Study, study_options
from trl_vlm.scripts.evaluation import load_for_replies
from trl_vlm.scripts.inputs import rows_of
from trl_vlm.testbed.datasets import correction_rows
from trl_vlm.testbed.evaluate import caption_sampler

ARMS = {
    "sft": "SFT on chosen",
    "dpo": "DPO",
    "dense": "Dense DPO",
}

# RLHF-V as printed, all weights: 7 epochs of 1,401 rows in batches of 32. LoRA needs about ten times the rate.
PAPER = {
    "learning_rates": [5e-7],
    "epochs": 7.0,
    "beta": 0.1,
    "anchor": 0.0,
    "total_batch_size": 32,
    "batch_size": 4,
    "max_completion_length": 512,
    "gradient_checkpointing": True,
}


def corrected_replies(study: Study) -> Dataset:
    """Rows whose chosen reply is the rejected one with its wrong segments rewritten."""
    if not study.on_testbed:
        return rows_of(study.options.dataset_name, "dataset_name")
    model, processor = load_for_replies(study.supervised_model())
    seed = 100 * study.options.seed + 41
    return correction_rows(study.world, study.options.pairs, seed, caption_sampler(model, processor))


def main() -> None:
    options, model = study_options(Options, PAPER, "dense_dpo", lora={"learning_rates": [5e-6]})
    study = Study("Dense DPO", options, model, ARMS, purpose="dpo")
    rows = corrected_replies(study)
    anchor = {"sft": options.anchor} if options.anchor else {}

    def train_arm(arm: str, rate: float, folder: Path) -> Any:
        if arm == "sft":
            return study.trainer(rows, rate, folder, {"sft": 1.0})
        settings = {"dense_preset": "paper"} if arm == "dense" else {"beta": options.beta}
        return study.trainer(rows, rate, folder, {"sigmoid": 1.0, **anchor}, **settings)

    study.run(train_arm)


if __name__ == "__main__":
    main()
