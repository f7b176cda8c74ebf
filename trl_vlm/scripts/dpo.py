"""DPO of a vision-language model, with every option of `DPOConfig`: Dense DPO, several rejected replies, POVID's loss.

    accelerate launch -m trl_vlm.scripts.dpo \
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name pairs.parquet --output_dir outputs/dpo \
        --use_peft --lora_target_modules language-model --learning_rate 1e-5 \
        --num_train_epochs 3 --total_batch_size 32 --max_length None

Dense DPO, with the values of the RLHF-V paper, is `--dense_preset paper`. Rows: `prompt`, `chosen`, `rejected`,
`images` (docs/data.md). `--dry_run` checks everything and prints the plan; `--config run.yaml` reads options from a
file.
"""

from collections.abc import Sequence

from trl import ModelConfig, TrlParser

from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.scripts.arguments import ScriptArguments, script_parser
from trl_vlm.scripts.job import options_of, prepared


def make_parser(prog: str | None = None) -> TrlParser:
    """The script's options."""
    return script_parser(ScriptArguments, DPOConfig, ModelConfig, prog=prog)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains.

    Args:
        arguments: What follows the program's name; `sys.argv` if None.
    """
    job = prepared(*options_of(make_parser(), arguments), purpose="dpo", unit="pairs")
    if job is not None:
        job.train(DPOTrainer(job.model_name, **job.trainer_arguments))


if __name__ == "__main__":
    main()
