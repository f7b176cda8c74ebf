"""Annotated rows of a page become pairs that train Dense DPO on the marked words."""

import json

import pytest

from tests.data.converters.helpers import annotated, image_folder
from trl_vlm.data.checks import check_dataset
from trl_vlm.data.converters import BadRecord, Source, convert
from trl_vlm.data.converters.annotations import to_rows


def test_the_rewritten_reply_is_chosen_and_the_marked_words_are_the_rejected_spans():
    (row,) = to_rows(annotated()).rows
    assert row["chosen"][0]["content"] == "Two dogs run there."
    assert row["rejected"][0]["content"] == "Three dogs run 🐕 there."
    assert row["rejected_spans"] == [[0, 5]]
    assert row["kinds"] == ["number"]


def test_spans_move_with_the_white_space_that_rows_do_not_keep():
    record = annotated(
        reply="  Three dogs ", spans=[{"start": 1, "end": 7}, {"start": 8, "end": 13, "kind": "object"}]
    )
    (row,) = to_rows(record).rows
    assert [row["rejected"][0]["content"][start:end] for start, end in row["rejected_spans"]] == ["Three", "dogs"]


def test_what_was_only_marked_is_counted_and_what_was_only_rewritten_has_no_spans():
    assert to_rows(annotated(rewrite=None)).dropped == {"marked, and not rewritten": 1}
    assert to_rows(annotated(spans=[])).rows[0]["rejected_spans"] is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"spans": [{"start": 3}]}, "a span without start and end"),
        ({"spans": [{"start": 0, "end": 99}]}, "a span that is not in the reply"),
        ({"spans": [{"start": 0, "end": 5, "text": "Seven"}]}, "a span that is not in the reply"),
        ({"reply": None}, "reply is not text"),
        ({"image": None}, "missing image"),
        ({"prompt": []}, "prompt holds no turns"),
    ],
)
def test_what_cannot_be_a_row_is_refused(other, reason):
    with pytest.raises(BadRecord, match=reason):
        to_rows(annotated(**other))


@pytest.mark.parametrize("output", ["rows", "rows.parquet", "rows.jsonl"])
def test_an_export_becomes_rows_that_pass_the_check(tmp_path, output):
    image_folder(tmp_path / "images", "bus.png")
    records = [annotated(), annotated(spans=[]), annotated(rewrite=None)]
    (tmp_path / "annotations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Source(str(tmp_path / "annotations.jsonl"))
    report = convert("annotations", source, tmp_path / output, images=tmp_path / "images", progress=False)
    assert (report.records, report.rows, report.dropped) == (3, 2, {"marked, and not rewritten": 1})
    checked = check_dataset(Source(str(tmp_path / output)).records(), "dpo")
    assert checked.problems == []
    assert checked.rows == 2
