"""What the tests of the reward trainer share: options, a trainer of a tiny llava, slow definitions."""

import math

import torch

from tests.families import load_processor, saved
from tests.preference_rows import preference_rows
from trl_vlm import RewardConfig, RewardTrainer
from trl_vlm.data.encoding import RewardCollator
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.reply_ends import with_reply_ends

SHORT = JudgeTemplate("judge . {facts}", "facts : {bullets} .", bullet="{fact}", separator=" ; ", opening="it is")
IMAGES = [1, 0, 2, 1]  # of the rows of `preference_rows()`
LLAVA = with_reply_ends(load_processor("llava"))


SETTINGS = dict(
    max_steps=2,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=2,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
)


def config(folder, **changes):
    return RewardConfig(str(folder), **SETTINGS | changes)


def llava(folder, *, rows=None, trainer=None, **changes):
    return RewardTrainer(
        str(saved("llava", sharp=8)),
        config(folder, **changes),
        train_dataset=preference_rows() if rows is None else rows,
        **{"judge_template": SHORT} | (trainer or {}),
    )


def trained(trainer):
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def scores_one_by_one(model, processor, rows, template=SHORT, seed=42):
    """(N, 2), chosen and rejected, each pair in a batch of its own."""
    collate = RewardCollator(processor, template, seed=seed)
    model.eval()
    return torch.cat([model(**collate([row])).logits.T for row in rows])


def loss_by_definition(scores, margins=None):
    """Binary cross-entropy of "the second one is better", the pairs in an arbitrary order of their candidates."""
    total = 0.0
    for index, (chosen, rejected) in enumerate(scores.tolist()):
        margin = 0.0 if margins is None else margins[index]
        chosen -= margin
        first, second, second_is_better = (chosen, rejected, 0) if index % 2 else (rejected, chosen, 1)
        probability = 1 / (1 + math.exp(-(second - first)))
        total -= math.log(probability if second_is_better else 1 - probability)
    return total / len(scores)
