"""What commands on several processes download from a hub, which keeps count."""

import json
import os
import time

import pytest

from tests.evaluation.helpers import pope_folder
from tests.families import image, saved
from tests.forks import fork_group
from trl_vlm.cli import main as cli
from trl_vlm.judges import chat
from trl_vlm.models import downloads, generation

WEIGHTS = "model.safetensors"


class CountingHub:
    """A hub whose models, whatever their names, are one on disk; a slow line to a cache that processes share.

    Args:
        folder: Of the cache, and of the list of what was fetched.
    """

    def __init__(self, folder):
        self.folder, self.model = folder, saved("llava", sharp=4)

    def install(self, monkeypatch):
        monkeypatch.setattr(downloads, "cached_file", self.cached_file)
        monkeypatch.setattr(downloads, "base_of", lambda path, **hub: None)
        for module in (generation, chat):
            for name, file in (("load_generative_model", WEIGHTS), ("load_generative_processor", "tokenizer.json")):
                monkeypatch.setattr(module, name, self._loads(getattr(module, name), file))
        return self

    def cached_file(self, path, name, **options):
        return self._fetched(path, name) if (self.model / name).exists() else None

    def _loads(self, load, file):
        def loads(path, **options):
            self._fetched(path, file)
            return load(self.model, **options)

        return loads

    def _fetched(self, path, name):
        file = self.folder / f"{path.replace('/', '--')}--{name}"
        if not file.exists():
            log = os.open(self.folder / "fetched", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(log, f"{path} {name}\n".encode())
            os.close(log)
            time.sleep(0.3)  # another process that wants it now does not find it
            file.touch()
        return str(file)

    def fetched(self, name):
        """The models of which this file was fetched, each as often as it was."""
        lines = (self.folder / "fetched").read_text().splitlines()
        return sorted(line.split()[0] for line in lines if line.endswith(f" {name}"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    return CountingHub(tmp_path / "hub").install(monkeypatch)


def rows(folder):
    image(0).save(folder / "0.png")
    row = {"images": [str(folder / "0.png")], "prompt": [{"role": "user", "content": "What is it?"}]}
    (folder / "rows.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    return str(folder / "rows.jsonl")


def run(*words):
    assert cli.main(list(words)) == 0


@pytest.mark.distributed
def test_two_processes_that_make_pairs_download_policy_and_judge_once(hub, tmp_path, monkeypatch):
    first = chat.Answer("Better: 1")
    monkeypatch.setattr(chat.LocalChat, "__call__", lambda self, requests: [first for _ in requests])
    asked = ["--model", "owner/policy", "--judge-model", "owner/judge", "--no-both-orders", "--max-new-tokens", "3"]
    output = ["--input", rows(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    assert fork_group(lambda: run("pairs", "judged", *output, *asked)) == [0, 0]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    assert hub.fetched(WEIGHTS) == ["owner/judge", "owner/policy"]
    assert hub.fetched("tokenizer.json").count("owner/policy") == 1


@pytest.mark.distributed
def test_two_processes_that_evaluate_download_each_model_once(hub, tmp_path):
    data = ["--tasks", "pope", "--data", str(pope_folder(tmp_path / "data")), "--output", str(tmp_path / "out")]
    more = ["--max-new-tokens", "2", "--batch-size", "2", "--no-page"]
    assert fork_group(lambda: run("evaluate", "owner/one", "--baseline", "owner/two", *data, *more)) == [0, 0]
    assert hub.fetched(WEIGHTS) == hub.fetched("tokenizer.json") == ["owner/one", "owner/two"]
