# /// script
# dependencies = ["trl-vlm[bdhs,eval,quantization]"]
# ///
"""BDHS (2407.02477): rejected replies that the model writes itself while the image is hidden from it.

On a small world that it makes itself, on a CPU, in minutes:

    accelerate launch -m benchmarks.studies.bdhs            # pairs made once, before training
    accelerate launch -m benchmarks.studies.bdhs --online   # and with the current policy at every step

Beside it stand its controls, trained and tuned alike: supervised training on the same chosen replies, plain samples of
the model as rejected replies, noise on the image instead of the mask, and the mask without guidance. On a model and
instruction rows of your own (`prompt`, `completion`, `images`):

    accelerate launch --config_file accelerate_configs/zero2.yaml -m benchmarks.studies.bdhs \
        --model_name_or_path llava-hf/llava-v1.6-vicuna-7b-hf --dataset_name rows.parquet \
        --evaluation_dataset test.jsonl --arms mask --use_peft --lora_target_modules all-linear

A run that was interrupted goes on where it stopped; an arm that is done is not trained again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.studies.preference_study import ALIGNMENT_STUDY, Options, Study, study_options
from trl_vlm.pairs import BDHS, SelfSamples
from trl_vlm.pairs.bdhs.similarity import DEFAULT_ENCODER
from trl_vlm.scripts.inputs import rows_of
from trl_vlm.testbed.datasets import caption_rows
from trl_vlm.testbed.oracle import object_overlap

ARMS = {
    "sft": "SFT on chosen",
    "self": "DPO, self-samples",
    "noise": "BDHS, noise",
    "unguided": "mask only, unguided",
    "mask": "BDHS, mask",
    "online": "BDHS, online",
}

# The paper's final mask.
PAPER = ALIGNMENT_STUDY | {"mask_ratio": 0.99}
# Nine image tokens: with the paper's 0.99, hardly a picture would show any.
SMALL_WORLD = {"mask_ratio": 0.95}


@dataclass
class BDHSOptions(Options):
    """Options of the pairs."""

    online: bool = field(default=False, metadata={"help": "Also train with fresh pairs at every step."})
    mask_ratio: float | None = field(default=None, metadata={"help": "Ratio of image tokens that is hidden."})
    noise_steps: int = field(default=500, metadata={"help": "Steps of noise of the arm `noise`."})
    encoder: str = field(default=DEFAULT_ENCODER, metadata={"help": "Sentence encoder of the gate: hub id or folder."})
    generation_batch: int = field(default=32, metadata={"help": "Rows per batch while pairs are made."})


def sources(study: Study) -> dict[str, Callable[[], Any]]:
    """What makes the pairs of each arm."""
    options = study.options
    gate = object_overlap if study.on_testbed else options.encoder
    common = {"max_new_tokens": options.max_completion_length, "seed": options.seed}
    mask = {"mask_ratio": options.mask_ratio, **common}
    return {
        "self": lambda: SelfSamples(**common),
        "noise": lambda: BDHS(gate, mask_ratio=0.0, noise_steps=options.noise_steps, **common),
        "unguided": lambda: BDHS(gate, guided=False, **mask),
        "mask": lambda: BDHS(gate, **mask),
        "online": lambda: BDHS(gate, **mask),
    }


def main() -> None:
    options, model = study_options(BDHSOptions, PAPER, "bdhs", SMALL_WORLD)
    arms = {arm: title for arm, title in ARMS.items() if arm != "online" or options.online}
    study = Study("BDHS", options, model, arms, purpose="sft")
    if study.on_testbed:
        rows = caption_rows(study.world, options.pairs, 100 * options.seed + 51)
    else:
        rows = rows_of(options.dataset_name, "dataset_name")
    anchor = {"sft": options.anchor} if options.anchor else {}

    def train_arm(arm: str, rate: float, folder: Path) -> Any:
        if arm == "online":
            source = sources(study)["online"]()
            return study.trainer(rows, rate, folder, {"sigmoid": 1.0, **anchor}, beta=options.beta, pair_source=source)
        if arm == "sft":  # on what every other arm is anchored to
            pairs = study.pairs("self", sources(study)["self"], rows)
            return study.trainer(pairs, rate, folder, {"sft": 1.0})
        pairs = study.pairs(arm, sources(study)[arm], rows)
        return study.trainer(pairs, rate, folder, {"sigmoid": 1.0, **anchor}, beta=options.beta)

    study.run(train_arm)


if __name__ == "__main__":
    main()
