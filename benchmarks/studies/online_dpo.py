# /// script
# dependencies = ["trl-vlm[eval,quantization]"]
# ///
"""Online and mixed DPO (2407.02477): the policy replies twice while it trains, and a judge says which reply is better.

On a small world that it makes itself, on a CPU, in minutes:

    accelerate launch -m benchmarks.studies.online_dpo

There the judge knows what the pictures show. Beside it stand pairs that the same judge made once, before training
(offline), half of each (mixed), and supervised training on the replies that it chose offline. On a model and rows of
your own (`prompt`, `images`), with a judge of your own:

    accelerate launch --config_file accelerate_configs/zero2.yaml -m benchmarks.studies.online_dpo \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name prompts.parquet --evaluation_dataset test.jsonl \
        --judge https://judge.example/v1 --judge_model my-judge --arms online --use_peft

`--judge` is the address of an OpenAI-compatible endpoint (its key is read from the environment variable
`TRL_VLM_JUDGE_KEY`), or the folder of a reward model made by `RewardTrainer`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks.studies.preference_study import ALIGNMENT_STUDY, Options, Study, study_options
from trl_vlm.judges import EndpointJudge, Judge, RewardJudge
from trl_vlm.pairs import DatasetPairs, Judged, MixedPairs
from trl_vlm.rewards import RewardModelReward
from trl_vlm.scripts.inputs import rows_of
from trl_vlm.testbed.datasets import prompt_rows
from trl_vlm.testbed.oracle import truth_reward

KEY = "TRL_VLM_JUDGE_KEY"
ARMS = {
    "sft": "SFT on chosen",
    "offline": "DPO, offline",
    "mixed": "DPO, mixed",
    "online": "DPO, online",
}


@dataclass
class OnlineOptions(Options):
    """Options of the judge and the replies."""

    judge: str | None = field(default=None, metadata={"help": "Address of an endpoint, or a reward model's folder."})
    judge_model: str | None = field(default=None, metadata={"help": "The model that the endpoint is asked for."})
    replies: int = field(default=2, metadata={"help": "Replies per prompt."})
    offline_share: float = field(default=0.5, metadata={"help": "Share of offline pairs of the arm `mixed`."})
    generation_batch: int = field(default=64, metadata={"help": "Rows per batch while offline pairs are made."})


def judge_of(study: Study) -> Judge:
    """The testbed's truth, an endpoint, or a reward model."""
    options = study.options
    if options.judge is None:
        if study.on_testbed:
            return RewardJudge(truth_reward)
        raise SystemExit("`--judge` is needed with `--model_name_or_path`: an endpoint, or a reward model's folder.")
    if options.judge.startswith(("http://", "https://")):
        return EndpointJudge(options.judge, options.judge_model, key_variable=KEY)
    return RewardJudge(RewardModelReward(options.judge, batch_size=options.batch_size))


def main() -> None:
    options, model = study_options(OnlineOptions, ALIGNMENT_STUDY, "online_dpo")
    study = Study("Online DPO", options, model, ARMS, purpose="ppo")
    if study.on_testbed:
        rows = prompt_rows(study.world, options.pairs, 100 * options.seed + 61).remove_columns("facts")
    else:
        rows = rows_of(options.dataset_name, "dataset_name")
    anchor = {"sft": options.anchor} if options.anchor else {}

    def judged() -> Judged:
        return Judged(
            judge_of(study),
            replies=options.replies,
            max_new_tokens=options.max_completion_length,
            seed=options.seed,
        )

    def pairs() -> Dataset:
        return study.pairs("offline", judged, rows)

    def train_arm(arm: str, rate: float, folder: Path) -> Any:
        if arm == "sft":
            return study.trainer(pairs(), rate, folder, {"sft": 1.0})
        settings: dict[str, Any] = {"beta": options.beta}
        train_rows: Callable[[], Dataset] | Dataset = pairs
        if arm == "online":
            settings["pair_source"], train_rows = judged(), rows
        if arm == "mixed":
            settings["pair_source"] = MixedPairs(
                DatasetPairs(), judged(), probability=options.offline_share, seed=options.seed
            )
        data = train_rows() if callable(train_rows) else train_rows
        return study.trainer(data, rate, folder, {"sigmoid": 1.0, **anchor}, **settings)

    study.run(train_arm)


if __name__ == "__main__":
    main()
