"""Several rejected replies: TRL's loss, averaged over the pairs, with the chosen reply computed once."""

import pytest
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from tests.families import saved
from tests.trainers.dpo.helpers import logs, lora, losses, make, rows, text_rows
from trl_vlm import DPOConfig, DPOTrainer

pytestmark = pytest.mark.slow

OTHER = [{"role": "assistant", "content": "No dog is there."}]
THIRD = [{"role": "assistant", "content": "A wall, and another wall."}]
SHORT = {"max_steps": 3}


def with_extra(data, *replies):
    """Each row with these further rejected replies; the row's own rejected reply for None."""
    column = [[row["rejected"] if reply is None else reply for reply in replies] for row in data]
    return data.add_column("rejected_extra", column)


def with_rejected(data, reply):
    return data.map(lambda _: {"rejected": reply})


def train(tmp_path, data, **options):
    return losses(make(DPOTrainer, DPOConfig, tmp_path, data=data, **SHORT | options))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "paligemma"])
@pytest.mark.parametrize("share", [True, False])
def test_two_equal_rejected_replies_are_exactly_dpo(family, share, tmp_path):
    plain = train(tmp_path, rows(), family=family, share_prefix=share)
    assert_close(
        train(tmp_path, with_extra(rows(), None), family=family, share_prefix=share), plain, rtol=1e-5, atol=1e-6
    )


def test_the_mixing_weight_at_its_ends_gives_the_two_single_losses(tmp_path):
    data = with_extra(rows(), OTHER)
    assert_close(train(tmp_path, data, rejected_weight=1.0), train(tmp_path, rows()), rtol=1e-5, atol=1e-6)
    other = train(tmp_path, with_rejected(rows(), OTHER))
    assert_close(train(tmp_path, data, rejected_weight=0.0), other, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_weighted_mean_of_the_single_losses(tmp_path):
    # The reference is another model and all rows are in one batch, so that the first losses differ.
    def first_loss(data, **options):
        other = AutoModelForImageTextToText.from_pretrained(saved("llava", seed=1, sharp=4.0))
        return train(tmp_path, data, per_device_train_batch_size=4, max_steps=1, ref_model=other, **options)[0]

    one, two, three = map(first_loss, (rows(), with_rejected(rows(), OTHER), with_rejected(rows(), THIRD)))
    found = first_loss(with_extra(rows(), OTHER, THIRD), rejected_weight=0.6)
    assert abs(one - two) > 5e-3 and abs(one - three) > 5e-4
    assert_close(found, 0.6 * one + 0.2 * two + 0.2 * three, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"dense_preset": "paper"}, {"peft_config": lora()}, {"ld_alpha": 0.5}])
def test_sharing_changes_no_averaged_loss(options, tmp_path):
    data = with_extra(rows(), OTHER, THIRD)
    found, wanted = (train(tmp_path, data, share_prefix=share, **options) for share in (True, False))
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_dense_weights_of_the_chosen_reply_follow_each_pair(tmp_path):
    # The extra reply differs from the chosen one in a single word, the rejected one in nearly all.
    data = rows((1, 1))
    near = [[[{"role": "assistant", "content": row["chosen"][0]["content"].replace(" and ", " or ")}]] for row in data]
    data = data.add_column("rejected_extra", near)
    trainer = make(DPOTrainer, DPOConfig, tmp_path, data=data, dense_preset="paper")
    batch = trainer.data_collator([data[0], data[1]])
    assert batch["changed_tokens"].shape[:2] == (2, 4)
    changed = batch["changed_tokens"].sum((1, 2))
    assert changed[0] > 2 * changed[1] > 0
    one = train(tmp_path, data, dense_preset="paper", rejected_weight=0.0)
    single = rows((1, 1)).map(lambda row, index: {"rejected": near[index][0]}, with_indices=True)
    other = train(tmp_path, single, dense_preset="paper")
    assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_text_rows_take_further_rejected_replies_too(tmp_path):
    plain = train(tmp_path, text_rows())
    assert_close(train(tmp_path, with_extra(text_rows(), None)), plain, rtol=1e-5, atol=1e-6)


def test_the_chosen_reply_is_counted_and_computed_once(tmp_path):
    data = with_extra(rows((1, 1)), OTHER)
    trainer = make(DPOTrainer, DPOConfig, tmp_path, data=data, max_steps=1)
    batch = trainer.data_collator([data[0], data[1]])
    assert len(batch["input_ids"]) == 6
    seen = []
    trainer.model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[0])
    )
    (entry,) = logs(trainer)
    assert len(seen) == 1 and seen[0] <= 2  # one pass: a sequence for each row, or one for both
    assert entry["num_tokens"] == batch["attention_mask"].sum()


def test_rows_with_other_numbers_of_replies_are_named(tmp_path):
    data = rows((1, 1)).add_column("rejected_extra", [[OTHER], []])
    trainer = make(DPOTrainer, DPOConfig, tmp_path, data=data)
    with pytest.raises(ValueError, match="row 1 of the batch: `rejected_extra` holds 0 replies, and the first"):
        trainer.data_collator([data[0], data[1]])
