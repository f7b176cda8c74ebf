"""Online and mixed DPO: the policy replies several times at every step, and a judge says which reply is better.

    accelerate launch -m trl_vlm.scripts.online_dpo \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name prompts.parquet --output_dir outputs/online_dpo \
        --endpoint http://localhost:8000/v1 --judge_model my-judge --max_requests 5000 \
        --use_peft --lora_target_modules language-model --learning_rate 1e-5 \
        --num_train_epochs 1 --total_batch_size 32 --max_length None

Rows: `prompt`, `images` (docs/data.md); with `--offline_share 0.5` (mixed DPO) also `chosen` and `rejected`.
"""

from collections.abc import Sequence
from dataclasses import field, make_dataclass

from trl import ModelConfig, TrlParser

from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.pairs import DatasetPairs, Judged, MixedPairs
from trl_vlm.rewards import RemoteReward
from trl_vlm.scripts.arguments import refusals, script_parser
from trl_vlm.scripts.inputs import check_address, check_model
from trl_vlm.scripts.job import options_of, prepared
from trl_vlm.scripts.rewards import ServedArguments
from trl_vlm.scripts.sources import source_arguments, source_from

OFFLINE = field(
    default=0.0, metadata={"help": "Fraction of rows whose own pair is used in place of a fresh one: mixed DPO."}
)


def make_parser(prog: str | None = None) -> TrlParser:
    """The script's options."""
    judged = source_arguments(Judged, DPOConfig)
    options = make_dataclass("OnlineArguments", [("offline_share", float, OFFLINE)], bases=(judged, ServedArguments))
    return script_parser(options, DPOConfig, ModelConfig, prog=prog)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains.

    Args:
        arguments: What follows the program's name; `sys.argv` if None.
    """
    script, training, model = options_of(make_parser(), arguments)
    with refusals():
        if script.endpoint is not None:
            check_address(script.endpoint, "endpoint")
        if script.reward_model is not None:
            check_model(script.reward_model, "reward_model")
        if script.reward_server is not None:
            key_variable = script.reward_server_key_variable
            script.served = RemoteReward(script.reward_server, key_variable=key_variable).served()
        source = source_from(Judged, script, DPOConfig, training.seed)
        if script.offline_share:
            source = MixedPairs(DatasetPairs(), source, probability=script.offline_share, seed=training.seed)
    job = prepared(script, training, model, purpose="dpo" if script.offline_share else "ppo", unit="pairs")
    if job is not None:
        job.train(DPOTrainer(job.model_name, pair_source=source, **job.trainer_arguments))


if __name__ == "__main__":
    main()
