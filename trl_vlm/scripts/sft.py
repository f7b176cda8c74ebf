"""Supervised fine-tuning of a vision-language model, with every option of `SFTConfig`.

    accelerate launch -m trl_vlm.scripts.sft \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name sft.parquet --output_dir outputs/sft \
        --use_peft --lora_target_modules language-model --learning_rate 1e-4 \
        --num_train_epochs 1 --total_batch_size 128 --max_length None

Rows: `prompt`, `completion`, `images` (docs/data.md). `--freeze_vision_tower` leaves the vision tower as it is.
"""

from collections.abc import Sequence

from trl import ModelConfig, TrlParser

from trl_vlm import SFTConfig, SFTTrainer
from trl_vlm.scripts.arguments import ScriptArguments, script_parser
from trl_vlm.scripts.job import options_of, prepared


def make_parser(prog: str | None = None) -> TrlParser:
    """The script's options."""
    return script_parser(ScriptArguments, SFTConfig, ModelConfig, prog=prog)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains.

    Args:
        arguments: What follows the program's name; `sys.argv` if None.
    """
    job = prepared(*options_of(make_parser(), arguments), purpose="sft", unit="rows")
    if job is not None:
        job.train(SFTTrainer(job.model_name, **job.trainer_arguments))


if __name__ == "__main__":
    main()
