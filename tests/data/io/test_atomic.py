import os
import subprocess
import sys
import threading
import time

import pytest

from trl_vlm.data.io import atomic
from trl_vlm.data.io.atomic import remove_leftovers, whole, write_whole

WRITER = """
import sys
from pathlib import Path
from trl_vlm.data.io.atomic import whole, write_whole
write_whole(sys.argv[1], "old")
with whole(sys.argv[1]) as unfinished:
    unfinished.write_text("half of the n")
    print(unfinished.name, flush=True)
    input()
"""


@pytest.mark.parametrize("data", ["für", "für".encode()])
def test_text_and_bytes_are_written_and_nothing_else_stays(tmp_path, data):
    write_whole(tmp_path / "a.json", "before")
    write_whole(str(tmp_path / "a.json"), data)
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "für"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_error_while_writing_keeps_the_old_file_and_leaves_nothing(tmp_path):
    write_whole(tmp_path / "a", "old")
    with pytest.raises(OSError, match="disk full"), whole(tmp_path / "a") as unfinished:
        unfinished.write_text("new")
        raise OSError("disk full")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_killed_writer_leaves_the_old_file_and_what_it_began_is_removed_by_the_next(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    begun = writer.stdout.readline().strip()
    atomic._cleaned.discard(tmp_path)
    write_whole(tmp_path / "b", "other")
    assert (tmp_path / begun).exists()  # its writer is alive
    writer.kill()
    writer.communicate()
    assert (tmp_path / "a").read_text() == "old"
    atomic._cleaned.discard(tmp_path)
    write_whole(tmp_path / "b", "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_files_of_another_machine_are_removed_when_they_are_old_and_files_of_others_never(tmp_path):
    names = [".a.elsewhere.1-2.tmp", ".b.elsewhere.1-2.tmp", "notes.tmp", ".notes.tmp"]
    for name in names:
        (tmp_path / name).write_text("x")
    day_before_yesterday = time.time() - 2 * 24 * 3600
    for name in names[1:]:
        os.utime(tmp_path / name, (day_before_yesterday, day_before_yesterday))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {names[1]}


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def is_folder(descriptor):
        return os.path.isdir(f"/proc/self/fd/{descriptor}")

    monkeypatch.setattr(
        os, "fsync", lambda file: (events.append("folder" if is_folder(file) else "file"), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    write_whole(tmp_path / "a", "b")
    assert events == ["file", "rename", "folder"]


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path):
    texts = [str(number) * 20_000 for number in range(8)]
    threads = [threading.Thread(target=write_whole, args=(tmp_path / "a", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    write_whole(tmp_path / ("ü" * 127), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["ü" * 127]
