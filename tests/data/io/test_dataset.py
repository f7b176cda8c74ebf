"""Rows to train on come from every place that `trl-vlm check` reads."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_vlm.data.io.dataset import load_rows
from trl_vlm.data.io.source import Source

ROWS = [{"prompt": [{"role": "user", "content": f"What is {number}?"}]} for number in range(3)]


@pytest.fixture
def places(tmp_path):
    """Where the same rows are, by form."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "folder").mkdir()
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.to_parquet(tmp_path / "folder" / "train.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    names = ("rows.jsonl", "rows.json", "rows.parquet", "folder", "saved", "splits")
    return {name: str(tmp_path / name) for name in names}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "folder", "saved", "splits"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_rows_are_those_that_check_reads(places, name, streaming):
    rows = load_rows(Source(places[name]), streaming=streaming)
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    split = "train" if name == "splits" else None  # `check` wants it said, where there are several
    assert list(rows) == list(Source(places[name], split=split).records()) == ROWS


def test_a_split_is_chosen_by_its_name(places):
    assert len(load_rows(Source(places["splits"], split="test"))) == 1
    with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\]; got 'dev'"):
        load_rows(Source(places["splits"], split="dev"))
    with pytest.raises(ValueError, match="holds one dataset without splits"):
        load_rows(Source(places["saved"], split="dev"))


def test_several_splits_without_train_must_be_chosen_from(tmp_path):
    dataset = Dataset.from_list(ROWS)
    DatasetDict({"a": dataset, "b": dataset}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has the splits \['a', 'b'\]; got None"):
        load_rows(Source(str(tmp_path / "saved")))
    DatasetDict({"a": dataset}).save_to_disk(tmp_path / "one")
    assert len(load_rows(Source(str(tmp_path / "one")))) == 3


def test_data_files_choose_among_the_files_of_a_folder(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "first.parquet")
    Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "second.parquet")
    assert len(load_rows(Source(str(tmp_path), data_files="second.parquet"))) == 1
