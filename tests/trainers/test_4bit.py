"""What a 4-bit base must not change: the additions to DPO, supervised training and PPO, by numbers, on the CPU."""

import math

import pytest
import trl
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tests.families import load_processor, saved
from tests.trainers.dpo import helpers as dpo
from tests.trainers.ppo import helpers as ppo
from tests.trainers.ppo.test_token_rewards import at_the_end, totals
from trl_vlm import DPOConfig, DPOTrainer, PPOTrainer, SFTConfig, SFTTrainer
from trl_vlm.models.reply_ends import with_reply_ends

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

IMAGE = {"image_weight": 1.0, "image_corruption": "noise", "anchor_weight": 0.5, "dense_preset": "paper"}
SETTINGS = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "logging_steps": 1}
SETTINGS |= {"max_length": None, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}


@pytest.fixture(scope="module")
def model():
    return str(saved("llava", sharp=4.0, width=64))


def parts(model, targets="language-model-and-projector"):
    """What all trainers of 4-bit models get."""
    return {
        "processing_class": with_reply_ends(load_processor(model)),
        "peft_config": LoraConfig(r=4, lora_alpha=16, target_modules=targets),
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }


def preference(model, folder, **options):
    """The logs of pairs with an image side and weights for segments and replies."""
    args = DPOConfig(str(folder), **SETTINGS, **options)
    return dpo.logs(
        DPOTrainer(model, args=args, train_dataset=dpo.with_weights(dpo.rows((1, 2, 1, 1))), **parts(model))
    )


def test_the_image_pair_and_weights_train_with_a_shared_prefix_as_without(model, tmp_path):
    shared, plain = (preference(model, tmp_path, share_prefix=share, **IMAGE) for share in (True, False))
    assert shared[0]["loss"] == pytest.approx(2.5 * math.log(2), abs=1e-5)  # the adapter starts as the reference
    assert shared[-1]["loss"] < shared[0]["loss"] - 0.01 and shared[1]["image/margin"] != 0
    difference, metric = dpo.largest_difference(shared, plain)
    assert difference < 1e-3, metric


def test_image_metrics_at_weight_0_change_no_digit(model, tmp_path):
    plain = preference(model, tmp_path, dense_preset="paper")
    watched = preference(model, tmp_path, dense_preset="paper", image_metrics=True, image_corruption="crop")
    assert [{name: entry[name] for name in other} for entry, other in zip(watched, plain, strict=True)] == plain


def test_supervised_losses_are_trls(model, tmp_path):
    rows = dpo.rows((1, 2, 1, 1)).rename_column("chosen", "completion").remove_columns("rejected")
    losses = []
    for trainer, config in ((SFTTrainer, SFTConfig), (trl.SFTTrainer, trl.SFTConfig)):
        given = parts(model, r".*language_model.*_proj")
        losses.append(dpo.losses(trainer(model, args=config(str(tmp_path), **SETTINGS), train_dataset=rows, **given)))
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("share_base", [False, True])
def test_rewards_of_tokens_are_those_of_replies_where_all_stands_at_the_end(share_base, model, tmp_path):
    logs = []
    for reward in (totals, at_the_end, ppo.reward_each_token):
        args = ppo.settings(tmp_path, max_steps=2, seed=1, share_base=share_base)
        trainer = PPOTrainer(model, reward, args, train_dataset=ppo.rows([1, 2, 1, 1]), **parts(model))
        trainer.train()
        steps = [log for log in trainer.state.log_history if "loss" in log]
        logs.append([(log["loss"], log["reward"], log["ppo/value_loss"]) for log in steps])
    assert logs[0] == logs[1]
    assert logs[0][0][1] == logs[2][0][1] and logs[0][0][2] != logs[2][0][2]
