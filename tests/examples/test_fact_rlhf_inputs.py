"""The tutorial begins only when it can end: wrong options and files are sentences before the first stage."""

import json
import runpy
import sys

import pytest

from tests import families
from tests.examples.test_fact_rlhf import SCRIPT
from tests.scripts.helpers import rows

COLUMNS = {
    "sft_dataset": ("images", "prompt", "completion"),
    "dataset_name": ("images", "prompt", "chosen", "rejected", "facts"),
    "prompt_dataset": ("images", "prompt", "facts"),
    "evaluation_dataset": ("images", "prompt", "objects"),
}


def call(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def given(tmp_path):
    """All four files of a user, and a model."""
    options = {"model_name_or_path": families.saved("llava"), "output_dir": tmp_path / "out"}
    for option, columns in COLUMNS.items():
        options[option] = tmp_path / f"{option}.jsonl"
        options[option].write_text("\n".join(map(json.dumps, rows(tmp_path, columns, count=40))))
    return options


def words(given):
    return [word for name, value in given.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("missing", COLUMNS)
def test_a_file_that_is_not_there_is_found_before_the_first_stage(given, missing, monkeypatch, tmp_path):
    given[missing].unlink()
    with pytest.raises(SystemExit, match=f"`--{missing}`: There is no file or folder"):
        call(monkeypatch, *words(given), "--rollout_size", 8)
    assert not (tmp_path / "out").exists()


def test_rows_to_evaluate_on_that_were_forgotten_are_found_before_the_first_stage(given, monkeypatch, tmp_path):
    del given["evaluation_dataset"]
    with pytest.raises(SystemExit, match="`--evaluation_dataset` is missing: a .parquet"):
        call(monkeypatch, *words(given), "--rollout_size", 8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "column", "message"),
    [
        ("evaluation_dataset", "objects", "none of the columns objects, answer"),
        ("dataset_name", "facts", "none of the columns facts"),
        ("sft_dataset", "completion", "row 0, column 'completion'"),
    ],
)
def test_a_column_that_is_not_there_is_found_before_the_first_stage(
    given, option, column, message, monkeypatch, tmp_path
):
    left = [{name: row[name] for name in row if name != column} for row in map(json.loads, given[option].open())]
    given[option].write_text("\n".join(map(json.dumps, left)))
    with pytest.raises(SystemExit, match=f"`--{option}`.*{message}"):
        call(monkeypatch, *words(given), "--rollout_size", 8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stages", "evaluation"), "`--stages` is evaluation; choose from sft, reward, ppo, evaluate"),
        (("--arms", "fact"), "`--arms` is fact; choose from facts, no_facts"),
        (("--per_device_train_batch_size", 2), "There is no option --per_device_train_batch_size. Did you mean --"),
        (("--model_name_or_path", "./nowhere"), "there is no folder './nowhere'"),
    ],
)
def test_a_wrong_option_is_a_sentence(options, message, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, "--output_dir", tmp_path / "out", *options)


def test_the_plan_has_the_papers_sizes_on_any_number_of_devices(given, monkeypatch, caplog):
    caplog.set_level("INFO")
    few = ("--rollout_size", 16, "--reward_batch_size", 8, "--sft_batch_size", 8, "--batch_size", 4)
    call(monkeypatch, *words(given), *few, "--dry_run")
    assert "sft: 40 rows, 1 epochs, 5 steps of 8 rows (4 x 2 accumulated x 1 device(s))" in caplog.text
    assert "reward: 38 rows, 1 epochs, 5 steps of 8 pairs" in caplog.text  # a twentieth is held out
    assert "ppo: 40 rows, 4 epochs, 32 steps of 8 replies" in caplog.text
    assert "rollouts of 16 replies to 16 prompts, 4 steps each" in caplog.text
    with pytest.raises(SystemExit, match="There are 40 prompts, and one rollout needs 512"):
        call(monkeypatch, *words(given))
