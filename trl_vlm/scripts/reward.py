"""A reward model that reads images and facts, with every option of `RewardConfig`.

    accelerate launch -m trl_vlm.scripts.reward \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name pairs.parquet --output_dir outputs/reward \
        --use_peft --lora_target_modules language-model --lora_r 64 --lora_alpha 16 --learning_rate 2e-5 \
        --num_train_epochs 1 --total_batch_size 32

Rows: `prompt`, `chosen`, `rejected`, `images`, `facts` (docs/data.md). `--use_facts False` trains one that does not
read the facts.
"""

from collections.abc import Sequence

from trl import ModelConfig, TrlParser

from trl_vlm import RewardConfig, RewardTrainer
from trl_vlm.scripts.arguments import ScriptArguments, script_parser
from trl_vlm.scripts.job import options_of, prepared


def make_parser(prog: str | None = None) -> TrlParser:
    """The script's options."""
    parser = script_parser(ScriptArguments, RewardConfig, ModelConfig, prog=prog)
    parser.set_defaults(lora_task_type="SEQ_CLS")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains.

    Args:
        arguments: What follows the program's name; `sys.argv` if None.
    """
    job = prepared(*options_of(make_parser(), arguments), purpose="reward", unit="pairs")
    if job is not None:
        job.train(RewardTrainer(job.model_name, **job.trainer_arguments))


if __name__ == "__main__":
    main()
