"""Supervised fine-tuning of a vision-language model, with every option of TRL's `SFTConfig`.

    accelerate launch -m trl_vlm.scripts.sft \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name sft.parquet --output_dir outputs/sft \
        --use_peft --lora_target_modules all-linear --learning_rate 1e-4 \
        --num_train_epochs 1 --total_batch_size 128 --max_length None

Rows: `prompt`, `completion`, `images` (docs/data.md). The vision tower is frozen unless `--train_vision_tower`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

from trl_vlm.models import freeze_vision_tower, keep_parameter_names
from trl_vlm.models.reply_ends import with_reply_ends
from trl_vlm.scripts.arguments import ScriptArguments, script_parser
from trl_vlm.scripts.job import options_of, prepared


@dataclass
class SFTArguments(ScriptArguments):
    """Options beside TRL's."""

    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower as well."})
    append_eos: bool = field(
        default=True,
        metadata={"help": "Where the chat template does not end a reply (LLaVA-1.5), append the end token to it."},
    )


def make_parser(prog: str | None = None) -> TrlParser:
    """The script's options."""
    return script_parser(SFTArguments, SFTConfig, ModelConfig, prog=prog)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains.

    Args:
        arguments: What follows the program's name; `sys.argv` if None.
    """
    job = prepared(*options_of(make_parser(), arguments), purpose="sft", unit="rows")
    if job is None:
        return
    processor = with_reply_ends(job.processor) if job.script.append_eos else job.processor
    trainer = SFTTrainer(job.model.model_name_or_path, processing_class=processor, **job.trainer_arguments)
    keep_parameter_names(trainer.model)
    if not job.script.train_vision_tower:
        freeze_vision_tower(trainer.model)
    job.train(trainer)


if __name__ == "__main__":
    main()
