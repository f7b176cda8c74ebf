"""PPO with a critic, with every option of `PPOConfig`.

    accelerate launch -m trl_vlm.scripts.ppo \
        --model_name_or_path outputs/sft --reward_model_name_or_path outputs/reward --dataset_name prompts.parquet \
        --output_dir outputs/ppo --use_peft --lora_target_modules language-model --lora_r 64 --lora_alpha 16 \
        --learning_rate 3e-5 --num_train_epochs 4 \
        --num_mini_batches 2 --num_ppo_epochs 2 --total_batch_size 256 --kl_coef 0.1 --missing_eos_penalty 8

Rows: `prompt`, `images`, and what the reward reads, such as `facts` (docs/data.md). The critic starts from the reward
model. A rollout has `num_mini_batches` times `total_batch_size` replies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import ModelConfig, TrlParser

from trl_vlm import PPOConfig, PPOTrainer
from trl_vlm.scripts.arguments import model_arguments, refusals, script_parser
from trl_vlm.scripts.inputs import check_model
from trl_vlm.scripts.job import options_of, prepared
from trl_vlm.scripts.rewards import RolloutArguments, check_rewards, rewards_of


@dataclass
class PPOArguments(RolloutArguments):
    """Options of the reward, and of where the critic starts."""

    value_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub id of a reward model that the critic starts from; by default that of "
            "`reward_model_name_or_path`, else the policy."
        },
    )


def make_parser(prog: str | None = None) -> TrlParser:
    """The script's options."""
    return script_parser(PPOArguments, PPOConfig, ModelConfig, prog=prog)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains.

    Args:
        arguments: What follows the program's name; `sys.argv` if None.
    """
    script, training, model = options_of(make_parser(), arguments)
    check_rewards(script)
    if script.value_model_name_or_path is not None:
        with refusals():
            check_model(script.value_model_name_or_path, "value_model_name_or_path")
    job = prepared(script, training, model, purpose="ppo", unit="replies")
    if job is None:
        return
    trainer = PPOTrainer(
        job.model_name,
        reward_funcs=rewards_of(script, batch_size=training.per_device_train_batch_size, **model_arguments(model)),
        value_model=script.value_model_name_or_path or script.reward_model_name_or_path,
        processing_class=job.processor,
        **job.trainer_arguments,
    )
    job.train(trainer)


if __name__ == "__main__":
    main()
