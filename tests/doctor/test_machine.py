"""What a machine has: releases, devices, folders, nodes; each line against a machine that lacks something."""

import shutil
from collections import namedtuple

import pytest
import torch

from trl_vlm.doctor import machine
from trl_vlm.requirements import EXTRAS, OLDEST, TESTED


def only(findings):
    (finding,) = findings
    return finding


def release(monkeypatch, version):
    monkeypatch.setattr(machine, "_installed", lambda package: version)
    return only(machine.versions({"torch": "2.6"}, {"torch": "2.13.0"}))


@pytest.mark.parametrize(
    ("version", "verdict", "words"),
    [
        ("2.13.0+cu128", "ok", "as in the tests"),
        ("2.9.1", "note", "the tests run with 2.13.0"),
        ("3.0", "note", "the tests run with 2.13.0"),
        ("2.5.1", "differs", "`pip install -U 'torch>=2.6'`"),
        (None, "differs", "not installed: `pip install 'torch>=2.6'`"),
    ],
)
def test_a_release_is_compared_with_the_oldest_and_the_tested_one(monkeypatch, version, verdict, words):
    finding = release(monkeypatch, version)
    assert finding.verdict == verdict and words in finding.text


def test_every_requirement_has_a_line_and_optional_packages_may_be_absent(monkeypatch):
    assert {finding.name for finding in machine.versions()} == set(OLDEST)
    assert EXTRAS.keys() <= machine.BACKENDS.keys() and (OLDEST | EXTRAS).keys() == TESTED.keys()
    monkeypatch.setattr(machine, "_installed", lambda package: None)
    assert {finding.verdict for finding in machine.backends()} == {"note"}
    monkeypatch.setattr(machine, "_installed", lambda package: "0.1")
    assert {finding.name for finding in machine.backends() if finding.verdict == "differs"} == set(EXTRAS)


Card = namedtuple("Card", ["name", "total_memory", "major"])


@pytest.mark.parametrize(
    ("major", "verdict", "words"), [(9, "ok", "H200, 140.0 GiB; bfloat16"), (7, "differs", "no bfl")]
)
def test_a_card_without_bfloat16_needs_another_dtype(monkeypatch, major, verdict, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card("H200", 140 * 2**30, major))
    finding = only(machine.devices())
    assert finding.verdict == verdict and words in finding.text


def test_a_card_that_torch_does_not_see_is_a_fault(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    finding = only(machine.devices())
    assert finding.verdict == "differs" and "was built without CUDA" in finding.text


@pytest.fixture
def one_node(monkeypatch):
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def folder(findings, name):
    return only(finding for finding in findings if finding.name == name)


def test_a_folder_need_not_exist_and_must_be_writable(one_node, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    output = tmp_path / "new" / "run"
    assert folder(machine.folders(output), "output").verdict in ("ok", "note")
    assert not output.exists()

    def refused(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refused)
    findings = machine.folders(output)
    assert [folder(findings, name).verdict for name in ("HF_HOME", "output")] == ["differs"] * 2
    assert "cannot be written to (Permission denied)" in folder(findings, "output").text


Usage = namedtuple("Usage", ["total", "used", "free"])


def test_little_space_and_little_shared_memory_are_told(one_node, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    findings = machine.folders(tmp_path)
    assert "a model of 7B and its checkpoints need more" in folder(findings, "output").text
    assert "64 MiB; data loaders and NCCL" in folder(findings, "/dev/shm").text


@pytest.mark.parametrize(("kind", "verdict"), [("ext4", "differs"), ("nfs4", "ok"), ("lustre", "ok")])
def test_several_nodes_need_folders_that_all_see(one_node, monkeypatch, tmp_path, kind, verdict):
    monkeypatch.setattr(machine, "file_system", lambda path: kind)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**50, 0, 2**50))
    assert folder(machine.folders(tmp_path), "output").verdict == "ok"
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert folder(machine.folders(tmp_path), "output").verdict == verdict
    assert only(machine.cluster()).text.startswith("2, this one is number")


def test_nodes_are_counted_from_the_scheduler_or_the_launcher(one_node, monkeypatch):
    assert machine.nodes() == 1
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert machine.nodes() == 1  # nothing says how many run here
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert machine.nodes() == 2
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert machine.nodes() == 4


def test_a_path_lies_on_the_innermost_file_system(tmp_path):
    table = tmp_path / "mounts"
    lines = ["overlay / overlay rw 0 0", f"server:/x {tmp_path} nfs4 rw 0 0", f"disk {tmp_path}/a\\040b ext4 rw 0 0"]
    table.write_text("\n".join(lines) + "\n")
    (tmp_path / "a b").mkdir()
    assert machine.file_system(tmp_path, table) == "nfs4"
    assert machine.file_system(tmp_path / "a b", table) == "ext4"
    assert machine.file_system(tmp_path.parent, table) == "overlay"
    assert machine.file_system(tmp_path, tmp_path / "gone") == "an unknown file system"


def test_the_hub_folder_is_that_of_the_hub_library(monkeypatch):
    from huggingface_hub import constants

    assert str(machine.hub_folder()) == constants.HF_HOME
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(machine.hub_folder()) == "/somewhere/huggingface"
