import datasets
import pytest

from trl_vlm.data.converters import Source
from trl_vlm.data.io import source as sources


def test_a_json_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    file = tmp_path / "list.json"
    file.write_text('\n[ {"a": [1, {"b": "}],"}]} ,\n{"a": "4"},{}]  ')
    for chunk in (1, 2, 7, 1000):
        monkeypatch.setattr(sources, "CHUNK_CHARACTERS", chunk)
        assert list(Source(str(file)).records()) == [{"a": [1, {"b": "}],"}]}, {"a": "4"}, {}]


def test_json_lines_may_be_called_json(tmp_path):
    file = tmp_path / "lines.json"
    file.write_text('{"a": 1}\n\n{"a": "one"}\n')
    assert list(Source(str(file)).records()) == [{"a": 1}, {"a": "one"}]
    assert list(Source(str(file)).records(skip=1)) == [{"a": "one"}]
    assert list(Source(str(file)).records(limit=1)) == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.json", '[{"a": 1}, {"a": ', "record 1 is not JSON, or the list breaks off"),
        ("a.json", '[{"a": 1}', "record 1 is not JSON, or the list breaks off"),
        ("a.json", "[3]", "record 0 is a int; a record must be a JSON object"),
        ("a.json", "<html>", "starts with '<'; it must hold a JSON list of records"),
        ("a.json", " ", "starts with ''; it must hold a JSON list"),
        ("a.jsonl", '{"a": 1}\n{"a": ', "line 2 is not JSON"),
        ("a.jsonl", "[]\n", "line 1 is a list"),
        ("a.tsv", "a\tb", "ends in '.tsv'; files that can be read end in .parquet, .json, .jsonl"),
    ],
)
def test_damaged_and_unknown_files_are_refused(tmp_path, name, text, fault):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=fault):
        list(Source(str(tmp_path / name)).records())


def test_what_is_neither_there_nor_a_hub_id_is_refused(tmp_path):
    for location in (str(tmp_path / "gone"), "gone.parquet", "data/gone/rows"):
        with pytest.raises(FileNotFoundError, match="no file or folder .* and it cannot be a hub id"):
            Source(location)


def test_a_single_file_takes_no_hub_options(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="is a single file: leave out revision, split"):
        Source(str(tmp_path / "a.json"), split="train", revision="main")


def test_a_hub_data_set_is_streamed_with_all_that_was_asked_for(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return {"train": datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}, {"a": 2}, {"a": 3}]))}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("owner/name", config="c", revision="r", data_files="d.json")
    assert list(source.records(skip=1, limit=2)) == [{"a": 2}]
    assert calls == [(("owner/name", "c"), {"revision": "r", "data_files": "d.json", "streaming": True})]


def test_a_data_set_with_a_loading_script_is_refused_with_the_way_round(monkeypatch):
    def load_dataset(*arguments, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found VLFeedback.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="pass the revision `refs/convert/parquet`"):
        Source("MMInstruction/VLFeedback").records()
