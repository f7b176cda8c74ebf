"""Reward training with prompt and images computed once per pair is reward training."""

import math

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from tests.families import FAMILIES, load_processor, saved
from tests.preference_rows import preference_row, preference_rows
from tests.trainers.reward.helpers import LLAVA, SHORT, config, llava, losses, scores_one_by_one, trained
from trl_vlm import RewardTrainer
from trl_vlm.models.prefix_sharing.sharing import SHARED_PREFIX

SHARING = [family for family in FAMILIES if family != "paligemma"]


def make(folder, family="llava", *, peft_config=None, **changes):
    path = saved(family, sharp=6)
    return RewardTrainer(
        str(path),
        config(folder, **changes),
        train_dataset=preference_rows([1, 2, 0]),
        processing_class=load_processor(path),
        judge_template=SHORT,
        peft_config=peft_config,
    )


def loss_and_gradients(trainer):
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(len(trainer.train_dataset))])
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.model.zero_grad()
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: value.grad.clone() for name, value in named if value.grad is not None}


def assert_the_same(shared, plain, tolerance=1e-4):
    loss, gradients = loss_and_gradients(shared)
    wanted_loss, wanted = loss_and_gradients(plain)
    assert loss == pytest.approx(wanted_loss, rel=tolerance)
    assert gradients.keys() == wanted.keys()
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        if "vision" in name and name.endswith("k_proj.bias"):
            # A softmax ignores what all keys have in common: this gradient is zero, and what is there is rounding.
            assert max(gradients[name].norm(), gradient.norm()) < 1e-6 * largest, name
        else:
            assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_every_pair_keeps_its_margin(tmp_path):
    shared = make(tmp_path)
    rows = [preference_row(0) | {"margin": margin} for margin in (0.5, -1.0, 2.0)]
    assert shared.data_collator(rows)["margin"].tolist() == [0.5, -1.0, 2.0]


@pytest.mark.parametrize("family", SHARING)
def test_loss_and_every_gradient_equal_the_plain_path_with_no_one_and_two_images(family, tmp_path):
    shared, plain = (make(tmp_path, family, share_prefix=share) for share in (True, False))
    assert SHARED_PREFIX in shared.data_collator([preference_row(0)])
    assert SHARED_PREFIX not in plain.data_collator([preference_row(0)])
    assert_the_same(shared, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_and_gradient_checkpointing_change_no_gradient(checkpointing, tmp_path):
    # A vision tower inside the adapter, and factors that are both random.
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    shared, plain = (make(tmp_path, share_prefix=share, peft_config=lora) for share in (True, False))
    if checkpointing:
        shared.model.get_base_model().gradient_checkpointing_enable()
    assert_the_same(shared, plain)


def test_several_steps_and_the_evaluation_after_them_are_those_of_the_plain_path(tmp_path):
    changes = {"max_steps": 4, "per_device_train_batch_size": 2, "mean_reward_coefficient": 0.5}
    options = {"trainer": {"eval_dataset": preference_rows([1, 2, 0, 1, 1])}}
    shared, plain = (trained(llava(tmp_path, share_prefix=share, **changes, **options)) for share in (True, False))
    assert_close(losses(shared), losses(plain), rtol=1e-3, atol=1e-4)
    found, wanted = (
        {key: value for key, value in trainer.evaluate().items() if "reward" in key or key == "eval_num_tokens"}
        for trainer in (shared, plain)
    )
    assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_the_score_is_read_at_each_replys_last_token_though_replies_and_facts_differ_in_length(tmp_path):
    rows = [
        preference_row(0, chosen=[{"role": "assistant", "content": "A cat. " * 9}], facts=["a red cat"]),
        preference_row(1, rejected=[{"role": "assistant", "content": "A dog. " * 7}], facts=["a wall"] * 5),
        preference_row(2, rejected=preference_row(2)["chosen"]),  # nothing but the prompt is left to share or not
    ]
    trainer = llava(tmp_path)
    batch = trainer.data_collator(rows)
    batch.pop("margin")
    with torch.no_grad():
        found = trainer.model.eval()(**batch).logits.reshape(2, 3).T
    assert_close(found, scores_one_by_one(trainer.model, LLAVA, rows), rtol=0, atol=1e-5)
    assert_close(found[2, 0], found[2, 1])


def test_prompt_and_images_are_computed_once_and_judge_turns_for_each_reply(tmp_path):
    trainer = llava(tmp_path)
    batch = trainer.data_collator([preference_row(0), preference_row(1)])
    lengths, prompts = batch["attention_mask"].sum(1), batch[SHARED_PREFIX][:, 1]
    assert len(batch["pixel_values"]) == 2
    seen = []
    layer = trainer.model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    trainer.compute_loss(trainer.model, batch)
    # The check of the pixels reads the batch twice more.
    assert set(seen) == {(1, int(prompts[:2].sum() + (lengths - prompts).sum()))}


@pytest.mark.parametrize("images", [(1,), (1, 2)])
def test_pairs_of_two_identical_replies_alone_in_a_batch_add_nothing_and_stop_nothing(images, tmp_path):
    rows = preference_rows(list(images)).map(lambda row: {"rejected": row["chosen"]})
    changes = {"max_steps": 2, "per_device_train_batch_size": len(images), "rows": rows}
    assert_close(losses(trained(llava(tmp_path, **changes))), [math.log(2)] * 2)


def test_margins_of_several_pairs_stay_beside_them(tmp_path):
    trainer = llava(tmp_path)
    rows = [preference_row(0, margin=0.5), preference_row(1, margin=1.5), preference_row(2, images=0)]
    assert trainer.data_collator(rows)["margin"].tolist() == [0.5, 1.5, 0.0]


def test_paligemma_takes_the_plain_path_and_says_why_once(tmp_path, caplog):
    trainer = make(tmp_path, "paligemma")
    messages = [record.getMessage() for record in caplog.records if "computed once per reply" in record.getMessage()]
    assert len(messages) == 1
    assert "paligemma reads a conversation that was encoded as a whole" in messages[0]
    assert trainer.data_collator is trainer._reward_collator


def test_a_collator_of_ones_own_is_left_as_it_is(tmp_path, caplog):
    trainer = llava(tmp_path, trainer={"data_collator": LLAVA})
    assert trainer.data_collator is LLAVA
    assert "the data collator is not the trainer's own" in caplog.text


def test_switched_off_it_says_nothing(tmp_path, caplog):
    llava(tmp_path, share_prefix=False)
    assert "computed once" not in caplog.text
