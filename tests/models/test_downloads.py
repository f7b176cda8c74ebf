"""On several processes, what is downloaded is downloaded once: the main process goes first, then one of each node."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed import ROOT, _free_port
from trl_vlm.models import downloads
from trl_vlm.models.downloads import download_weights, fetch_weights, once_per_node

# Four processes, which say when they enter and leave. 0 and 2 are the first ones of their nodes.
PROCESSES = """
import os, sys, time
from trl_vlm.models.downloads import once_per_node
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
children = []
for rank in range(4):
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
        with once_per_node():
            os.write(log, f"in {rank}\\n".encode())
            time.sleep(0.3)
            os.write(log, f"out {rank}\\n".encode())
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.distributed
def test_the_main_process_goes_first_and_then_the_first_one_of_each_node(tmp_path):
    common = {**os.environ, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": "2"}
    subprocess.run([sys.executable, "-c", PROCESSES, str(tmp_path / "log")], env=common, check=True, timeout=300)
    events = (tmp_path / "log").read_text().splitlines()
    assert events[:4] == ["in 0", "out 0", "in 2", "out 2"]
    assert sorted(events[4:]) == ["in 1", "in 3", "out 1", "out 3"]


def test_one_process_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(downloads, "PartialState", None)  # it is not even asked
    monkeypatch.setattr(downloads, "download_weights", None)
    with once_per_node():
        fetch_weights({"owner/model": {}})


@pytest.fixture
def hub(monkeypatch):
    """A hub with these files; what is fetched from it."""
    files = {"owner/sharded": ["model.safetensors.index.json"], "owner/small": ["model.safetensors"]}
    fetched = []

    def cached(path, name, **options):
        if name not in files.get(path, ()):
            return None
        fetched.append((path, name, options.get("revision")))
        return f"cache/{name}"

    def shards(path, index, **options):
        fetched.append((path, index, options.get("revision")))

    monkeypatch.setattr(downloads, "cached_file", cached)
    monkeypatch.setattr(downloads, "get_checkpoint_shard_files", shards)
    monkeypatch.setattr(downloads, "base_of", lambda path, **hub: None)
    return fetched


def test_weights_in_one_file_and_in_several_are_fetched_at_their_revision(hub):
    download_weights("owner/small", revision="v2")
    assert hub == [("owner/small", "model.safetensors", "v2")]
    hub.clear()
    download_weights("owner/sharded")
    index = "model.safetensors.index.json"
    assert hub == [("owner/sharded", index, None), ("owner/sharded", f"cache/{index}", None)]


def test_of_an_adapter_on_disk_the_base_is_fetched(hub, monkeypatch, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    bases = {str(tmp_path): "owner/small"}
    monkeypatch.setattr(downloads, "base_of", lambda path, **hub: bases.get(str(path)))
    download_weights(tmp_path)
    assert hub == [("owner/small", "model.safetensors", None)]


def test_a_folder_with_all_weights_needs_nothing(hub, tmp_path):
    download_weights(tmp_path)
    assert hub == []
