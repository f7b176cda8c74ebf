"""Pairs that are made anew every few steps or each epoch, with our trainer and with TRL's."""

import pytest
import trl
from torch.testing import assert_close

from tests.families import load_processor
from tests.trainers.dpo.helpers import logs, losses, make, rows, text_rows
from tests.trainers.dpo.sources import Greedy, message
from tests.trainers.dpo.test_pair_sources import Written, instructions
from trl_vlm import DPOConfig, DPOTrainer, PairSourceCallback

pytestmark = pytest.mark.slow

OURS, TRLS = (DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)
BOTH = pytest.mark.parametrize("kind", [OURS, TRLS], ids=["ours", "trl"])
SHORT = {"max_steps": 4, "per_device_train_batch_size": 2}


def refreshed(kind, folder, source, data=None, *, every_steps=None, batch_size=32, vllm=None, **options):
    trainer = make(*kind, folder, data=instructions() if data is None else data, **SHORT | options)
    trainer.add_callback(
        PairSourceCallback(source, trainer, every_steps=every_steps, batch_size=batch_size, vllm=vllm)
    )
    return trainer


@BOTH
def test_the_rows_own_pairs_written_back_are_offline_dpo(kind, tmp_path):
    wanted = losses(make(*kind, tmp_path, data=rows(), **SHORT))
    assert_close(losses(refreshed(kind, tmp_path, Written(), rows(), every_steps=1)), wanted, rtol=1e-6, atol=1e-7)


@BOTH
def test_each_epoch_trains_on_what_the_policy_says_at_its_beginning(kind, tmp_path):
    source = Greedy()
    trainer = refreshed(kind, tmp_path, source, batch_size=2, max_steps=6, learning_rate=1e-2)
    entries = logs(trainer)
    assert [call["round"] for call in source.seen] == [0, 0, 2, 2, 4, 4]  # two batches of rows each
    said = [{name: reply for name, reply in zip(c["names"], c["replies"], strict=True)} for c in source.seen]
    first, last = said[0] | said[1], said[4] | said[5]
    assert first.keys() == last.keys() == {f"train row {number}" for number in range(4)}
    assert first != last
    assert [row["rejected"] for row in trainer.train_dataset] == [message(last[f"train row {n}"]) for n in range(4)]
    assert entries[0]["pairs/length"] == sum(map(len, first.values())) / 4
    assert "pairs/length" not in entries[1] and entries[2]["pairs/undecided"] == 0


@BOTH
def test_every_few_steps_counts_steps_and_the_last_one_needs_no_new_pairs(kind, tmp_path):
    source = Greedy()
    trainer = refreshed(kind, tmp_path, source, every_steps=2, max_steps=4)
    trainer.train()
    assert [call["round"] for call in source.seen] == [0, 2]
    assert not any(call["training"] for call in source.seen) and trainer.model.training


def test_rows_without_a_decision_keep_the_pair_they_had_and_others_take_the_place_of_rows_without_any(tmp_path):
    undecided = ["train row 1", "train row 2"]
    trainer = refreshed(OURS, tmp_path, Greedy(undecided=undecided), rows())
    (entry, *_) = logs(trainer)
    assert entry["pairs/undecided"] == 0.5
    written = [row["rejected"] for row in trainer.train_dataset]
    own = rows()["rejected"]
    assert [mine == theirs for mine, theirs in zip(written, own, strict=True)] == [False, True, True, False]
    trainer = refreshed(OURS, tmp_path, Greedy(undecided=undecided))
    trainer.train()
    assert trainer.train_dataset.numbers == [0, 3] and len(trainer.train_dataset) == 4
    assert trainer.train_dataset[1]["rejected"] == trainer.train_dataset[3]["rejected"]
    with pytest.raises(ValueError, match="gave no pair for any of 4 rows"):
        refreshed(OURS, tmp_path, Greedy(undecided=[f"train row {n}" for n in range(4)])).train()


def test_further_rejected_replies_need_their_column_from_the_beginning(tmp_path):
    data = instructions().add_column("rejected_extra", [[message("No.")]] * 4)
    assert len(losses(refreshed(OURS, tmp_path, Greedy(extra=1), data, max_steps=2))) == 2
    with pytest.raises(ValueError, match="gave 1 `rejected_extra`, and the trainer reads 0. Give the training rows"):
        refreshed(OURS, tmp_path, Greedy(extra=1)).train()
    with pytest.raises(ValueError, match=r"`trl.DPOTrainer` knows no further rejected replies"):
        refreshed(TRLS, tmp_path, Greedy(extra=1)).train()


def test_the_watch_for_degeneration_needs_no_pairs(tmp_path):
    trainer = refreshed(OURS, tmp_path, Greedy(), degeneration_steps=1, degeneration_max_new_tokens=4, max_steps=1)
    assert "degeneration/repeats" in logs(trainer)[0]


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (TRLS, {"data": text_rows}, "it trains on rows without images"),
        (OURS, {"pair_source": Greedy()}, "it has a `pair_source`"),
        (TRLS, {"dataloader_num_workers": 1, "every_steps": 3}, "it has workers that hold copies"),
        (TRLS, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, "persistent_workers"),
        (TRLS, {"data": lambda: rows().to_iterable_dataset()}, "it trains on a stream"),
        (TRLS, {"every_steps": 0}, "`every_steps` is 0"),
    ],
)
def test_what_cannot_be_refreshed_says_why(kind, options, reason, tmp_path):
    options = dict(options)
    if "data" in options:
        options["data"] = options["data"]()
    with pytest.raises(ValueError, match=reason):
        refreshed(kind, tmp_path, Greedy(), **options)


def test_another_trainer_is_refused():
    with pytest.raises(TypeError, match="`trainer` is a LlavaProcessor. Pass the `DPOTrainer`"):
        PairSourceCallback(Greedy(), load_processor("llava"))
