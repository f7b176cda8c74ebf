import json

import pytest

from trl_vlm.evaluation.ledger import SETTINGS, Ledger, claim


def entries(folder):
    return {name: entry["reply"] for name, entry in Ledger(folder, "replies", 0).entries().items()}


def test_entries_of_all_processes_are_read_and_the_later_one_counts(tmp_path):
    Ledger(tmp_path, "replies", 0).append([{"id": "a", "reply": "1"}, {"id": "b", "reply": "2"}])
    Ledger(tmp_path, "replies", 1).append([{"id": "c", "reply": "3"}])
    Ledger(tmp_path, "replies", 1).append([{"id": "c", "reply": "4"}])
    assert entries(tmp_path) == {"a": "1", "b": "2", "c": "4"}


def test_what_was_appended_is_read_at_once_and_synced_once_a_second(tmp_path, monkeypatch):
    now, synced = [100.0], []
    monkeypatch.setattr("trl_vlm.evaluation.ledger.time.monotonic", lambda: now[0])
    monkeypatch.setattr("trl_vlm.evaluation.ledger.os.fsync", synced.append)
    ledger = Ledger(tmp_path, "replies", 0)
    for place, moment in enumerate((100.0, 100.4, 100.9, 101.0, 101.9)):
        now[0] = moment
        ledger.append([{"id": str(place), "reply": "x"}])
        assert len(entries(tmp_path)) == place + 1
    assert len(synced) == 2


def test_a_torn_or_damaged_line_is_dropped_and_the_next_entry_stands_alone(tmp_path):
    ledger = Ledger(tmp_path, "replies", 0)
    ledger.append([{"id": "a", "reply": "1"}])
    with open(ledger.path, "ab") as file:
        file.write(b'\xff\xfe not JSON\n[1]\n{"id": "b", "re')
    assert entries(tmp_path) == {"a": "1"}
    Ledger(tmp_path, "replies", 0).append([{"id": "c", "reply": "3"}])
    assert entries(tmp_path) == {"a": "1", "c": "3"}


def test_every_text_can_be_stored(tmp_path):
    text = 'line\nbreak \u2028 "quote" \x00 ünïcode'
    Ledger(tmp_path, "replies", 0).append([{"id": "a", "reply": text}])
    assert entries(tmp_path) == {"a": text}


def test_a_lone_surrogate_spoils_no_file(tmp_path):
    Ledger(tmp_path, "replies", 0).append([{"id": "a", "reply": "x\ud800"}, {"id": "b", "reply": "2"}])
    assert entries(tmp_path)["b"] == "2" and set(entries(tmp_path)) == {"a", "b"}


def test_settings_that_differ_are_named(tmp_path):
    claim(tmp_path / "new", {"model": "a", "limit": (1, 2)})
    claim(tmp_path / "new", {"model": "a", "limit": [1, 2]})
    with pytest.raises(ValueError, match=r"other settings \(limit, task\)"):
        claim(tmp_path / "new", {"model": "a", "task": "pope"})
    assert json.loads((tmp_path / "new" / SETTINGS).read_text())["model"] == "a"
    (tmp_path / "new" / SETTINGS).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        claim(tmp_path / "new", {"model": "a"})


def test_an_answer_that_came_late_is_not_hidden_by_the_failure_before_it(tmp_path):
    """With fewer questions left the processes share them out otherwise, so that files are in no order of time."""

    def has_answer(entry):
        return entry["answer"] is not None

    Ledger(tmp_path, "answers", 1).append([{"id": "a", "answer": None}])
    Ledger(tmp_path, "answers", 0).append([{"id": "a", "answer": "Rating: 4"}])
    assert Ledger(tmp_path, "answers", 0).entries(has_answer)["a"]["answer"] == "Rating: 4"
    Ledger(tmp_path, "answers", 1).append([{"id": "a", "answer": "Rating: 5"}])
    assert Ledger(tmp_path, "answers", 0).entries(has_answer)["a"]["answer"] == "Rating: 5"
