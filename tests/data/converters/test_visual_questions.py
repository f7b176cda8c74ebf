"""VQA-v2, A-OKVQA, Flickr30k Entities and COCO's captions: readers of published folders, and rows of them."""

import json
from collections import Counter

import pytest

from tests.data.converters.helpers import (
    FLICKR_CAPTIONS,
    a_okvqa,
    image_folder,
    llava_preference,
    write_coco_captions,
    write_flickr,
    write_vqav2,
)
from tests.data.converters.test_conversion import write_json
from trl_vlm.data.answers import option_letter, yes_or_no
from trl_vlm.data.checks import check_dataset
from trl_vlm.data.converters import CONVERTERS, BadRecord, Source, convert
from trl_vlm.data.converters import flickr30k_entities as flickr
from trl_vlm.data.converters.vqav2 import SHORT_ANSWER


def rows_of(name, folder, **options):
    converter = CONVERTERS[name]
    return [row for record in converter.reader(folder) for row in converter(record, **options).rows]


def replies(rows):
    return [row["completion"][0]["content"] for row in rows]


# VQA-v2


def test_each_question_of_vqa_v2_is_a_row_that_asks_for_a_short_answer(tmp_path):
    rows = rows_of("vqav2", write_vqav2(tmp_path))
    assert [(row["id"], row["answer"]) for row in rows] == [("9000", "2"), ("42001", "bed"), ("42000", "yes")]
    assert replies(rows) == ["2", "bed", "yes"]
    assert rows[2]["images"] == ["COCO_train2014_000000000042.jpg"]
    wordings = {wording.format("Is the cat asleep?") for wording in SHORT_ANSWER}
    assert rows[2]["prompt"][0]["content"] in wordings and len(rows[2]["prompt"]) == 1


def test_the_questions_of_an_image_make_one_dialogue_that_asks_once(tmp_path):
    folder = write_vqav2(tmp_path)
    whole = rows_of("vqav2", folder, turns="all")[1]
    assert [message["role"] for message in whole["messages"]] == ["user", "assistant"] * 2
    assert "What is it on?" in whole["messages"][0]["content"] != "What is it on?"
    assert whole["messages"][2]["content"] == "Is the cat asleep?" and "answer" not in whole
    each = rows_of("vqav2", folder, turns="each")
    assert [(len(row["prompt"]), row["answer"]) for row in each] == [(1, "2"), (1, "bed"), (3, "yes")]
    assert rows_of("vqav2", folder, turns="last") == [each[0], each[2]]
    assert [len(row["messages"]) for row in rows_of("vqav2", folder, turns="all", max_turns=1)] == [2, 2]


def test_answers_of_other_types_and_questions_without_annotation_are_counted(tmp_path):
    folder = write_vqav2(tmp_path)
    file = folder / "v2_OpenEnded_mscoco_train2014_questions.json"
    data = json.loads(file.read_text())
    data["questions"].append({"question_id": 43000, "image_id": 43, "question": "Where?"})
    file.write_text(json.dumps(data))
    image_folder(tmp_path / "images", "000000000042.jpg")
    output = tmp_path / "rows.parquet"
    settings = {"answer_types": ["yes/no"], "image_names": "2017", "images": tmp_path / "images", "progress": False}
    report = convert("vqav2", Source(str(folder)), output, **settings)
    assert (report.records, report.rows) == (3, 1)
    assert report.dropped == {"answer of another type": 2, "question without annotation": 1}
    rows = list(Source(str(output)).records())
    assert check_dataset(rows, "sft").problems == check_dataset(rows, "ppo").problems == []
    assert yes_or_no(rows[0]["completion"][0]["content"]) == rows[0]["answer"] == "yes"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"turns": "none"}, "`turns` is 'none'; it must be one of alone, each, last, all"),
        ({"answer_types": ["maybe"]}, r"`answer_types` is \['maybe'\]; choose one or more of yes/no, number, other"),
        ({"answer_types": []}, "choose one or more of"),
        ({"image_names": "2015"}, "`image_names` is '2015'; it must be one of 2014, 2017"),
    ],
)
def test_unknown_choices_of_vqa_v2_are_refused(tmp_path, options, fault):
    with pytest.raises(ValueError, match=fault):
        rows_of("vqav2", write_vqav2(tmp_path), **options)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"image_id": None}, "image_id is not a number"),
        ({"image_id": True}, "image_id is not a number"),
        ({"questions": [{"multiple_choice_answer": "yes"}]}, "missing columns"),
    ],
)
def test_odd_images_of_vqa_v2_are_bad_records(tmp_path, change, fault):
    record = list(CONVERTERS["vqav2"].reader(write_vqav2(tmp_path)))[1]
    with pytest.raises(BadRecord, match=fault):
        CONVERTERS["vqav2"]({**record, **change})


@pytest.mark.parametrize("value", [None, 3, "", " ", "<image>"])
@pytest.mark.parametrize("column", ["question", "multiple_choice_answer"])
def test_odd_texts_of_vqa_v2_are_bad_records(tmp_path, column, value):
    record = next(CONVERTERS["vqav2"].reader(write_vqav2(tmp_path)))
    with pytest.raises(BadRecord, match="question|answer"):
        CONVERTERS["vqav2"]({**record, "questions": [{**record["questions"][0], column: value}]})


def test_a_folder_that_does_not_hold_vqa_v2_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no .questions.*Unpack both archives of a split"):
        rows_of("vqav2", tmp_path)
    folder = write_vqav2(tmp_path)
    (folder / "v2_mscoco_train2014_annotations.json").write_text('{"annotations": [{}]}')
    with pytest.raises(ValueError, match="has another form than the published ones"):
        rows_of("vqav2", folder)
    (folder / "v2_mscoco_train2014_annotations.json").write_text("[]")
    with pytest.raises(ValueError, match="has no list 'annotations'"):
        rows_of("vqav2", folder)
    (folder / "v2_mscoco_train2014_annotations.json").write_text('{"annot')
    with pytest.raises(ValueError, match="is not JSON"):
        rows_of("vqav2", folder)


# A-OKVQA


def test_a_row_of_a_okvqa_replies_with_the_letter_and_its_facts_are_the_rationales():
    row = CONVERTERS["a-okvqa"](a_okvqa()).rows[0]
    assert row["images"] == ["000000000042.jpg"]
    assert row["prompt"][0]["content"].startswith("What runs on rails?\nA. bus\nB. tram\nC. boat\nD. car\n")
    assert replies([row]) == ["B. tram"]
    assert row["answer"] == "B" == option_letter(replies([row])[0])
    assert row["facts"] == ["Trams run on rails", "The rails are for a tram.", "A tram."]


def test_a_chain_of_thought_gives_the_first_rationale_and_then_the_letter():
    row = CONVERTERS["a-okvqa"](a_okvqa(), reply="rationale").rows[0]
    assert replies([row]) == ["Trams run on rails. The answer is B."]
    assert option_letter(replies([row])[0]) == "B"
    letter = CONVERTERS["a-okvqa"](a_okvqa()).rows[0]
    assert row["prompt"] != letter["prompt"] and row["facts"] == letter["facts"]
    with pytest.raises(BadRecord, match="no rationale"):
        CONVERTERS["a-okvqa"](a_okvqa(rationales=[]), reply="rationale")
    with pytest.raises(ValueError, match="`reply` is 'both'; it must be one of letter, rationale"):
        CONVERTERS["a-okvqa"](a_okvqa(), reply="both")


def test_the_test_split_of_a_okvqa_is_told_apart():
    with pytest.raises(BadRecord, match="no right choice: the test split"):
        CONVERTERS["a-okvqa"](a_okvqa(correct_choice_idx=None))


# Flickr30k Entities


def test_a_spotting_caption_has_the_boxes_behind_each_phrase(tmp_path):
    rows = rows_of("flickr30k-entities", write_flickr(tmp_path), captions="all")
    assert replies(rows) == [
        "A man [0.100,0.100,0.300,0.750] rides a bike [0.000,0.500,1.000,1.000;0.020,0.050,0.060,0.100] "
        "past the lake.",
        "Outside, a cyclist [0.100,0.100,0.300,0.750].",
    ]
    assert rows[0]["images"] == ["7.jpg"]
    assert rows[0]["facts"] == rows[1]["facts"] == ["A man rides a bike past the lake.", "Outside, a cyclist."]


def test_boxes_in_the_padded_square_are_measured_in_its_side(tmp_path):
    rows = rows_of("flickr30k-entities", write_flickr(tmp_path), captions="all", frame="square")
    # 500 x 400 in a square of 500: 50 above and below.
    assert replies(rows)[1] == "Outside, a cyclist [0.100,0.180,0.300,0.700]."


def test_one_caption_of_an_image_is_drawn_by_its_name(tmp_path):
    record = next(flickr.records(write_flickr(tmp_path)))
    drawn = Counter(replies(flickr.to_rows({**record, "id": str(name)}).rows)[0][0] for name in range(200))
    assert set(drawn) == {"A", "O"} and min(drawn.values()) > 60
    assert flickr.to_rows(record) == flickr.to_rows(record)


def test_the_captions_of_a_folder_are_written_and_pass_the_check(tmp_path):
    images = image_folder(tmp_path / "images", "7.jpg")
    output = tmp_path / "rows.parquet"
    source = Source(str(write_flickr(tmp_path / "flickr")))
    assert convert("flickr30k-entities", source, output, images=images, progress=False).rows == 1
    assert check_dataset(Source(str(output)).records(), "sft").problems == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"captions": []}, "no caption"),
        ({"captions": [" "]}, "empty caption"),
        ({"captions": [3]}, "caption is not text"),
        ({"size": [0, 4]}, "an image without size"),
        ({"image": ""}, "missing image"),
    ],
)
def test_odd_images_of_flickr_are_bad_records(tmp_path, change, fault):
    record = next(flickr.records(write_flickr(tmp_path)))
    with pytest.raises(BadRecord, match=fault):
        flickr.to_rows({**record, **change})


def test_a_folder_that_does_not_hold_flickr_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There are no captions in .*Sentences"):
        rows_of("flickr30k-entities", tmp_path)
    folder = write_flickr(tmp_path)
    for content in ("<annotation>", "<annotation/>", ""):
        (folder / "Annotations" / "7.xml").write_text(content)
        with pytest.raises(ValueError, match=r"7\.xml' cannot be read .*Is the folder complete"):
            rows_of("flickr30k-entities", folder)
    (folder / "Annotations" / "7.xml").unlink()
    with pytest.raises(ValueError, match=r"7\.xml' cannot be read"):
        rows_of("flickr30k-entities", folder)
    with pytest.raises(ValueError, match="`frame` is 'pixels'; it must be one of image, square"):
        flickr.to_rows({"captions": FLICKR_CAPTIONS}, frame="pixels")


# COCO's captions


def test_captions_become_the_facts_of_prompts(tmp_path):
    folder = write_coco_captions(tmp_path / "annotations")
    output = tmp_path / "rows.jsonl"
    report = convert("coco-captions", Source(str(folder)), output, skip_bad=True, progress=False)
    assert (report.rows, report.dropped) == (1, {"no captions": 1})
    row = next(Source(str(output)).records())
    assert (row["images"], row["image_id"]) == (["000000000042.jpg"], 42)
    assert row["facts"] == ["A puppy.", "A red dog."]


def test_the_file_of_captions_serves_other_datasets_as_facts(tmp_path):
    images = image_folder(tmp_path / "images", "000000000042.jpg")
    facts = write_coco_captions(tmp_path / "annotations") / "captions_train2017.json"
    source = write_json(tmp_path / "in.json", [llava_preference(image="000000000042.jpg")])
    output = tmp_path / "rows.jsonl"
    convert("llava-human-preference", source, output, images=images, facts=facts, progress=False)
    assert next(Source(str(output)).records())["facts"] == ["A puppy.", "A red dog."]


def test_a_folder_without_captions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no captions_\*.json"):
        rows_of("coco-captions", tmp_path)
    (tmp_path / "captions_x.json").write_text('{"images": [{}], "annotations": []}')
    with pytest.raises(ValueError, match="has an entry without 'id'"):
        rows_of("coco-captions", tmp_path)
    with pytest.raises(BadRecord, match="image_id is not a number"):
        CONVERTERS["coco-captions"]({"image_id": True, "file_name": "a.jpg", "captions": ["A dog."]})
