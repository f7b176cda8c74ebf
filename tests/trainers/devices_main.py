"""Trains, scores and makes pairs on the CPU, and then the same on a pretend accelerator; writes both as JSON.

    python devices_main.py FILE

A process of its own, since the backend of the pretend accelerator cannot be unregistered.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests import pretend_accelerator
from tests.families import batch, build, load_processor, saved
from tests.preference_rows import preference_rows
from tests.trainers.dpo import helpers as dpo
from tests.trainers.ppo.helpers import count_letters, settings
from tests.trainers.ppo.helpers import rows as prompts
from tests.trainers.reward import helpers as reward
from trl_vlm import DPOConfig, DPOTrainer, PPOTrainer
from trl_vlm.data.encoding import prompt_batches
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.models.generation import generated
from trl_vlm.models.prefix_sharing.sharing import SHARED_PREFIX, share_prefix
from trl_vlm.models.reply_ends import with_reply_ends
from trl_vlm.models.reward_model import load_reward_model
from trl_vlm.pairs import BDHS, Policy
from trl_vlm.rewards import RewardModelReward

FAMILIES = ("llava", "qwen2_5_vl")


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_dpo(device: torch.device, folder: str, family: str) -> list[float]:
    trainer = dpo.make(DPOTrainer, DPOConfig, Path(folder), family, max_steps=2, dense_preset="paper")
    assert trainer._shares
    assert trainer.model.device == device
    return losses(trainer)


def train_on_kept_features(device: torch.device, folder: str, family: str) -> list[float]:
    """DPO whose policy and reference read features that wait in the memory of the CPU."""
    adapter = dpo.lora(r".*language_model.*(q_proj|v_proj)")
    options = {"max_steps": 2, "share_prefix": False, "peft_config": adapter, "image_features_on_cpu": True}
    trainer = dpo.make(DPOTrainer, DPOConfig, Path(folder), family, **options)
    found = losses(trainer)
    kept = list(trainer._image_features._kept.values())
    assert kept and all(tensor.device.type == "cpu" for each in kept for layer in each.layers for tensor in layer)
    assert all(each.device == device for each in kept)
    return found


def train_ppo(device: torch.device, folder: str, family: str) -> list[float]:
    trainer = PPOTrainer(
        str(saved(family, sharp=8.0)),
        reward_funcs=count_letters,
        args=settings(folder, temperature=1e-3, seed=1),  # sampling, and yet the same replies after rounding
        train_dataset=prompts([1, 0, 2]),
    )
    assert trainer.value_model.device == device
    return losses(trainer)


def train_reward(device: torch.device, folder: str, family: str) -> list[float]:
    trainer = reward.RewardTrainer(
        str(saved(family, sharp=8)),
        reward.config(folder),
        train_dataset=preference_rows(),
        judge_template=reward.SHORT,
    )
    assert trainer.model.device == device
    return losses(trainer)


@cache
def reward_folder(family: str) -> str:
    folder = tempfile.mkdtemp()
    load_reward_model(saved(family, sharp=8.0), head_seed=1).save_pretrained(folder)
    load_processor(family).save_pretrained(folder)
    reward.SHORT.save_pretrained(folder)
    return folder


def score(device: torch.device, folder: str, family: str) -> list[float]:
    scorer = RewardModelReward(reward_folder(family), batch_size=2)
    scorer.model.to(device)
    rows = preference_rows()
    columns = {"images": rows["images"][:], "facts": rows["facts"][:]}
    return scorer(rows["prompt"][:], rows["chosen"][:], **columns)


def make_pairs(device: torch.device, folder: str, family: str) -> list[str]:
    rows = [
        {**row, "completion": row["chosen"], ROW_NAME: f"train row {place}"}
        for place, row in enumerate(preference_rows([1, 2]))
    ]
    model = build(family, sharp=3.0)[0].to(device)
    source = BDHS(lambda texts, others: [0.0] * len(texts), mask_ratio=0.5, max_new_tokens=8, max_sentence_tokens=4)
    made = source(rows, Policy(model, with_reply_ends(load_processor(family))))
    return [pair["rejected"][0]["content"] for pair in made]


def sample_replies(device: torch.device, folder: str, family: str) -> list[list[int]]:
    policy = Policy(build(family, sharp=8.0)[0].to(device), load_processor(family))
    batches = prompt_batches(policy.processor, prompts([1, 0]), batch_size=1)
    # So cold that rounding changes no draw.
    return [reply.tokens for reply in generated(policy, batches, max_new_tokens=4, temperature=1e-3, seed=0)]


def packed_logits(device: torch.device, folder: str, family: str) -> list[float]:
    """A shared prefix in a model that lies on two devices, as `device_map="auto"` puts it, or on the CPU."""
    model, processor = build(family, sharp=3.0)
    inputs = batch(processor, [1])
    ids = inputs["input_ids"].repeat(2, 1)
    prefix = ids.size(1)
    ids = torch.cat([ids, torch.tensor([[107, 108, 109], [110, 111, 112]])], dim=1)
    extra = {key: value.repeat(2, 1) for key, value in inputs.items() if key == "mm_token_type_ids"}
    extra = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in extra.items()}
    kept = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra, **kept}
    whole[SHARED_PREFIX] = torch.tensor([[0, prefix], [0, prefix]])
    share_prefix(model)
    if device.type != "cpu":
        pretend_accelerator.spread(model, model.model.language_model.layers)
    with torch.no_grad():
        logits = model(**{key: value.to(device) for key, value in whole.items()}).logits
    return logits[:, -1, :5].flatten().tolist()


def train_spread(device: torch.device, folder: str, family: str) -> list[float]:
    """DPO of a model that lies on two devices."""
    model = build(family, sharp=4.0)[0]
    model.config._name_or_path = str(saved(family, sharp=4.0))
    if device.type != "cpu":
        pretend_accelerator.spread(model, model.model.language_model.layers)
    targets = r".*language_model.*(q_proj|v_proj)"
    options = {"model": model, "max_steps": 2, "peft_config": dpo.lora(targets)}
    return losses(dpo.make(DPOTrainer, DPOConfig, Path(folder), family, **options))


CASES: dict[str, Callable[[torch.device, str, str], list]] = {
    "dpo": train_dpo,
    "dpo on kept features": train_on_kept_features,
    "ppo": train_ppo,
    "reward": train_reward,
    "scoring": score,
    "bdhs": make_pairs,
    "sampled replies": sample_replies,
    "shared prefix on two devices": packed_logits,
    "dpo on two devices": train_spread,
}


def run(device: torch.device) -> dict[str, dict[str, Any]]:
    """What each case gives for each family, or how it failed."""
    found = {}
    for family in FAMILIES:
        for name, case in CASES.items():
            pretend_accelerator.WAITS.clear()
            try:
                with tempfile.TemporaryDirectory() as folder:
                    result = {"result": case(device, folder, family)}
            except Exception:
                result = {"error": traceback.format_exc()}
            found[f"{name}, {family}"] = result | {"waits": dict(pretend_accelerator.WAITS)}
    return found


def forked_with_devices() -> None:
    """Makes `fork_rng` refuse to save the generators of all devices, which it does unless it is told which."""
    fork = torch.random.fork_rng

    def checked(*arguments: Any, **options: Any) -> Any:
        if not arguments and options.get("devices") is None:
            raise AssertionError("`fork_rng` without `devices` saves the generators of all devices.")
        return fork(*arguments, **options)

    torch.random.fork_rng = checked


def refusals(device: torch.device) -> dict[str, str]:
    """What the pretend accelerator says to what a real one refuses."""
    here, there = torch.ones(2, device=device), torch.ones(2, device=torch.device(device.type, 1))
    mixtures = {
        "cpu": lambda: here + torch.ones(2),
        "other device": lambda: here + there,
        "index": lambda: torch.ones(2)[here.long()],
        "numpy": here.numpy,
        "number": lambda: here + torch.tensor(1.0),
        "index of the cpu": lambda: here[torch.tensor([0])],
    }
    return {name: _said(function) for name, function in mixtures.items()}


def _said(function: Callable[[], Any]) -> str:
    try:
        function()
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    report = {"cpu": run(torch.device("cpu"))}
    module = pretend_accelerator.switch_on()
    device = torch.device(pretend_accelerator.NAME, 0)
    pretend_accelerator.train_on(device)
    forked_with_devices()
    report["device"] = run(device)
    report["saved generators"] = [str(saved_device) for saved_device in module.saved_generators]
    report["refusals"] = refusals(device)
    Path(sys.argv[1]).write_text(json.dumps(report))
