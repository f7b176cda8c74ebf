"""Pairs and replies of a running training stand in the trackers, with their images. The trackers are scripted."""

import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL.Image import Image
from transformers import TrainerCallback

from tests.trainers.dpo.helpers import make as make_dpo
from tests.trainers.dpo.helpers import rows
from tests.trainers.dpo.test_pair_sources import SHORT, Written, instructions
from tests.trainers.test_options import ROLLOUTS, make
from trl_vlm import DPOConfig, DPOTrainer

pytestmark = pytest.mark.slow


class Tracker:
    """What W&B and Trackio have in common: a run, tables, images, and a log."""

    def __init__(self):
        self.run, self.logged = object(), []

    def Table(self, dataframe):
        return dataframe

    def Image(self, image):
        assert isinstance(image, Image)
        return ("image", image.size)

    def log(self, values):
        self.logged.append(values)


class Board(TrainerCallback):
    """TensorBoard's callback of transformers, as far as one looks at it."""

    def __init__(self):
        self.texts, self.pictures = [], []
        self.tb_writer = SimpleNamespace(add_text=self._text, add_image=self._image)

    def _text(self, name, text, step):
        self.texts.append((name, text, step))

    def _image(self, name, pixels, step, dataformats):
        assert dataformats == "HWC" and pixels.dtype == np.uint8 and pixels.shape[2] == 3
        self.pictures.append((name, step))


@pytest.fixture
def trackers(monkeypatch):
    found = {"wandb": Tracker(), "trackio": Tracker()}
    for name, tracker in found.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    return found


def online(folder, data=None, **options):
    data = instructions() if data is None else data
    source = Written("completion" if "completion" in data.column_names else "rejected")
    return make_dpo(DPOTrainer, DPOConfig, folder, data=data, pair_source=source, **SHORT | options)


def report_to(trainer, *names):
    """As `report_to` of the configuration, without the callbacks, which would start real runs."""
    trainer.args.report_to = list(names)
    trainer.add_callback(board := Board())
    return board


def test_the_pairs_of_every_second_step_are_tables_with_their_images(trackers, tmp_path):
    trainer = online(tmp_path, rows(), log_pairs_steps=2, max_steps=4)
    board = report_to(trainer, "wandb", "trackio", "tensorboard")
    trainer.train()
    for tracker in trackers.values():
        tables = [values["pairs"] for values in tracker.logged]
        assert [set(table["step"]) for table in tables] == [{2}, {4}]
        for table in tables:
            assert {"prompt", "chosen", "rejected", "pair_round", "image"} <= set(table.columns)
            assert len(table) == 4 and all(isinstance(text, str) for text in table["chosen"])
            assert sorted(len(images) for images in table["image"]) == sorted(len(r["images"]) for r in rows())
    assert [(name, step) for name, _, step in board.texts] == [("pairs", 2), ("pairs", 4)]
    name, text, _ = board.texts[0]
    assert text.startswith("| step | prompt | chosen | rejected |") and len(text.splitlines()) == 6
    assert ("pairs/row 0, image 0", 2) in board.pictures
    kept = pd.read_parquet(tmp_path / "pairs" / "pairs_00004.parquet")
    assert list(kept["chosen"]) == list(trackers["wandb"].logged[1]["pairs"]["chosen"])


def test_without_the_option_no_pair_is_kept_or_written(trackers, tmp_path):
    trainer = online(tmp_path, rows())
    report_to(trainer, "wandb")
    trainer.train()
    assert not trackers["wandb"].logged and not (tmp_path / "pairs").exists()


def test_pairs_of_all_micro_batches_of_a_step_are_one_table(trackers, tmp_path):
    trainer = online(
        tmp_path, rows(), log_pairs_steps=1, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    report_to(trainer, "trackio")
    trainer.train()
    (values,) = trackers["trackio"].logged
    assert len(values["pairs"]) == 4


def test_a_wandb_that_was_not_started_is_left_alone(trackers, tmp_path):
    trackers["wandb"].run = None
    trainer = online(tmp_path, rows(), log_pairs_steps=1, max_steps=1)
    report_to(trainer, "wandb")
    trainer.train()
    assert not trackers["wandb"].logged


def test_an_interval_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`log_pairs_steps` is 0; set 1 or more"):
        DPOConfig(str(tmp_path), log_pairs_steps=0, use_cpu=True, bf16=False)


@pytest.mark.parametrize("method", ROLLOUTS)
def test_replies_are_shown_in_tensorboard_too(method, tmp_path):
    trainer = make(method, tmp_path, log_completions=True, logging_steps=1)
    board = report_to(trainer, "tensorboard")
    trainer.train()
    name, text, step = board.texts[0]
    assert (name, step) == ("completions", 1)
    columns = text.splitlines()[0]
    assert columns.startswith("| step | prompt | completion |") and columns.endswith("| advantage |")
    assert "count_letters" in columns and ("ppo/score" in columns) == (method == "PPO")
    assert ("completions/row 0, image 0", 1) in board.pictures


def test_replies_are_shown_in_no_tracker_unless_asked_for(tmp_path):
    trainer = make("PPO", tmp_path, logging_steps=1)
    board = report_to(trainer, "tensorboard")
    trainer.train()
    assert not board.texts and not board.pictures


def test_text_of_a_model_stays_one_cell():
    from trl_vlm.trainers.tables import Table, _markdown

    text = _markdown(Table({"reply": ["a | b\n<script>"], "score": [0.123456]}, [[]]))
    assert text.splitlines()[2] == "| a &#124; b<br>&lt;script> | 0.1235 |"
