"""HSA-DPO, HA-DPO and mDPO."""

import json

import pytest

from tests.data.converters.helpers import hsa_dpo, image_folder, mdpo, write_hadpo
from trl_vlm.data.checks import check_dataset
from trl_vlm.data.converters import CONVERTERS, BadRecord, Source, convert
from trl_vlm.data.converters.hadpo import REQUESTS, records


def replies(rows):
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def test_the_severity_weighs_the_rejected_reply_and_the_chosen_score_is_only_kept():
    row = CONVERTERS["hsa-dpo"](hsa_dpo()).rows[0]
    assert (row["rejected_score_weight"], row["chosen_score"]) == (2.5, 1.0)
    assert row["images"] == ["7.jpg"] and "chosen_score_weight" not in row
    assert row["prompt"] == [{"role": "user", "content": "Describe the table."}]
    record = {name: value for name, value in hsa_dpo().items() if not name.endswith("_score")}
    assert CONVERTERS["hsa-dpo"](record).rows[0]["rejected_score_weight"] == 1.0
    assert CONVERTERS["hsa-dpo"](hsa_dpo(image="a/b.jpg")).rows[0]["images"] == ["a/b.jpg"]


def test_the_prompt_of_mdpo_is_the_question_alone():
    row = CONVERTERS["mdpo"](mdpo()).rows[0]
    assert row["prompt"] == [{"role": "user", "content": "What color is the bus?"}]
    plain = CONVERTERS["mdpo"](mdpo(prompt="<image>\nWhat color is the bus?")).rows[0]
    assert plain == row


def test_one_pair_of_an_images_wordings_is_drawn_by_its_name(tmp_path):
    entries = list(records(write_hadpo(tmp_path)))
    assert [entry["image"] for entry in entries] == ["1.jpg", "2.jpg", "1.jpg", "1.jpg"]
    rows = CONVERTERS["hadpo"](entries[0]).rows
    assert rows == CONVERTERS["hadpo"](entries[0]).rows and len(rows) == 1
    assert rows[0]["prompt"][0]["content"] in REQUESTS
    drawn = {replies(CONVERTERS["hadpo"]({**entries[0], "image_id": name}).rows)[0][0] for name in range(20)}
    assert drawn == {"A cup.", "It is a cup."}
    every = CONVERTERS["hadpo"](entries[0], replies="all").rows
    assert replies(every) == [
        (chosen, rejected)
        for chosen in ("A cup.", "It is a cup.")
        for rejected in ("A cup and a fork.", "A cup, a fork.")
    ]


def test_a_question_that_the_model_answered_rightly_makes_no_pair(tmp_path):
    image_folder(tmp_path / "images", "1.jpg", "2.jpg")
    output = tmp_path / "rows.parquet"
    source = Source(str(write_hadpo(tmp_path / "hadpo")))
    report = convert("hadpo", source, output, images=tmp_path / "images", progress=False)
    assert (report.records, report.rows, report.dropped) == (4, 3, {"the model's answer is correct": 1})
    rows = list(Source(str(output)).records())
    assert [row["kind"] for row in rows] == ["desc", "desc", "pope"]
    assert replies(rows)[2] == ("No, there is none.", "Yes, a fork.")
    assert check_dataset(rows, "dpo").problems == []


def test_the_list_of_minigpt4_and_the_parts_of_visual_genome_are_read(tmp_path):
    folder = write_hadpo(tmp_path)
    (folder / "desc_data.json").write_text(json.dumps([{"image_id": 3, "chosen": "A.", "rejected": ["B."]}]))
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/3.jpg"
    (folder / "image_data.json").write_text(json.dumps([{"image_id": 3, "url": url}]))
    entry = next(records(folder))
    assert entry["image"] == "VG_100K_2/3.jpg"
    assert replies(CONVERTERS["hadpo"](entry).rows) == [("A.", "B.")]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"chosen": []}, "no chosen wording"),
        ({"chosen": None}, "chosen wordings are not a list"),
        ({"rejected": [3]}, "rejected wording is not text"),
        ({"rejected": ["A cup."], "chosen": ["A cup. "]}, "chosen and rejected are the same"),
        ({"image": None}, "missing image"),
        ({"kind": "pope"}, "missing columns"),
    ],
)
def test_odd_entries_are_bad_records(tmp_path, change, fault):
    entry = next(records(write_hadpo(tmp_path)))
    with pytest.raises(BadRecord, match=fault):
        CONVERTERS["hadpo"]({**entry, **change})


def test_a_folder_that_does_not_hold_ha_dpo_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither desc_data.json nor pope_data.json"):
        list(records(tmp_path))
    folder = write_hadpo(tmp_path)
    (folder / "image_data.json").write_text('[{"image_id": 3}]')
    with pytest.raises(ValueError, match="is not Visual Genome's list of images"):
        list(records(folder))
    (folder / "image_data.json").unlink()
    (folder / "desc_data.json").write_text('{"a": 3}')
    with pytest.raises(ValueError, match="must hold a list of entries, or one entry for each image"):
        list(records(folder))
    with pytest.raises(ValueError, match="`replies` is 'two'; it must be one of one, all"):
        CONVERTERS["hadpo"]({}, replies="two")
