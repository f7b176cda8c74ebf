"""A dataset on the hub holds its images, names no folder of this machine, and says how to load it; a scripted one."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from PIL import Image

from tests import families
from tests.hub import ScriptedHub
from trl_vlm.cli.main import main
from trl_vlm.data.io.hub import create_repository


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    return ScriptedHub(tmp_path_factory.mktemp("hub")).install(monkeypatch)


def povid(folder: Path, count: int = 4) -> list[str]:
    """A file of the published form with its images, and the words that convert it."""
    records = []
    for number in range(count):
        Image.new("RGB", (8 + number, 8), (20 * number, 0, 0)).save(folder / f"{number}.png")
        asked = {"from": "human", "value": "<image>\nWhat is it?"}
        said, spoilt = ({"from": "gpt", "value": text} for text in (f"A square {number}.", "A square and a cat."))
        record = {"id": str(number), "image": f"{number}.png", "conversations": [asked, said]}
        records.append(record | {"rejected_conversations": [asked, spoilt]})
    (folder / "povid.json").write_text(json.dumps(records))
    return ["convert", "--from", "povid", "--input", str(folder / "povid.json"), "--images", str(folder)]


def card_of(folder: Path) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("output", ["rows", "rows.parquet", "rows.jsonl"])
def test_converted_rows_are_uploaded_with_their_images_and_a_card(output, hub, tmp_path, capsys):
    words = [*povid(tmp_path), "--output", str(tmp_path / output), "--push-to-hub", "me/rows", "--private"]
    assert main(words) == 0
    assert hub.repositories == {"me/rows": {"repo_type": "dataset", "private": True, "exist_ok": True}}
    folder = hub.folder("me/rows")
    rows = load_dataset(str(folder), split="train", cache_dir=tmp_path / "cache")
    assert [row["images"][0].size for row in rows] == [(8 + number, 8) for number in range(4)]
    assert rows[1]["chosen"] == [{"role": "assistant", "content": "A square 1."}]
    about, text = card_of(folder)
    assert {"trl", "trl-vlm", "preference"} == set(about["tags"])
    assert about["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert 'load_dataset("me/rows", split="train")' in text and "| `chosen` | list of {" in text
    assert "[YiyangAiLab/POVID_preference_data_for_VLLMs](https://huggingface.co/datasets/" in text
    assert "The license and the terms are those of the original" in text
    assert str(tmp_path) not in text
    for shard in folder.rglob("*.parquet"):
        assert str(tmp_path).encode() not in shard.read_bytes()
    assert "Uploaded to https://hub.test/me/rows" in capsys.readouterr().err


def test_rows_that_are_held_out_are_the_split_test(hub, tmp_path):
    words = [*povid(tmp_path), "--output", str(tmp_path / "rows.parquet"), "--split-off", "1"]
    assert main([*words, "--push_to_hub", "me/rows"]) == 0
    rows = load_dataset(str(hub.folder("me/rows")), cache_dir=tmp_path / "cache")
    assert {split: len(part) for split, part in rows.items()} == {"train": 3, "test": 1}


@pytest.mark.parametrize("output", ["pairs", "pairs.parquet", "pairs.jsonl"])
def test_pairs_are_uploaded_with_the_card_that_they_have(output, hub, tmp_path):
    povid(tmp_path)
    source = tmp_path / "sft.jsonl"
    row = {
        "prompt": [{"role": "user", "content": "What is it?"}],
        "completion": [{"role": "assistant", "content": "A red square."}],
    }
    source.write_text("".join(json.dumps({**row, "images": [str(tmp_path / f"{n}.png")]}) + "\n" for n in range(3)))
    words = ["pairs", "povid", "--input", str(source), "--output", str(tmp_path / output)]
    assert main([*words, "--model", str(families.saved("llava", sharp=4)), "--push-to-hub", "me/pairs"]) == 0
    rows = load_dataset(str(hub.folder("me/pairs")), split="train", cache_dir=tmp_path / "cache")
    assert rows[0]["chosen"] == row["completion"] and rows[0]["rejected"] != row["completion"]
    assert rows[-1]["images"][0].height == 8
    about, text = card_of(hub.folder("me/pairs"))
    assert "trl-vlm" in about["tags"] and not text.lstrip().startswith("---")
    for part in (f"{len(rows)} pairs of 3 rows", "## Settings", "Paper: [2402.11411]", "| `pair_source` |"):
        assert part in text
    assert str(tmp_path) not in text and '"location": "sft.jsonl"' in text


def test_a_hub_that_refuses_does_so_before_the_work_begins(monkeypatch, tmp_path, capsys):
    hub = ScriptedHub(tmp_path / "hub", refuses="403 Forbidden: you may not write to me").install(monkeypatch)
    assert main([*povid(tmp_path), "--output", str(tmp_path / "rows"), "--push-to-hub", "me/rows"]) == 1
    error = capsys.readouterr().err
    assert "The hub does not take the dataset 'me/rows': 403 Forbidden" in error and "hf auth login" in error
    assert not (tmp_path / "rows").exists() and not hub.uploads
    with pytest.raises(ValueError, match="The hub does not take the model 'me/model'"):
        create_repository("me/model", "model")


def test_nothing_is_uploaded_that_was_not_asked_for(hub, tmp_path):
    assert main([*povid(tmp_path), "--output", str(tmp_path / "rows")]) == 0
    assert not hub.uploads and not hub.repositories
