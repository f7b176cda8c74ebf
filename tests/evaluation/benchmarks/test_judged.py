import json

import pytest

from tests.evaluation.helpers import metrics_of, mmhal_folder, record, write_image, write_json, write_lines
from trl_vlm.evaluation.benchmarks.llava_bench import COCO, IN_THE_WILD
from trl_vlm.evaluation.benchmarks.mmhal import MMHAL, MMHAL_V

ANSWERS = [
    "Good.\nRating: 6", "Rating: 4", "**Rating**: 3", "Rating: [2]", "Wrong.\nRating: 0",
    "I would say four.", "Rating: 5\nRating: 1", None,
]  # fmt: skip


def test_mmhal_with_hand_counted_ratings(tmp_path):
    metrics = metrics_of(MMHAL, mmhal_folder(tmp_path), ["A dog."] * 8, ANSWERS)
    assert metrics["score"] == (6 + 4 + 3 + 2 + 0) / 5
    assert metrics["hallucination_rate"] == 2 / 5
    assert metrics["informativeness"] == pytest.approx((3 + 1 + 0 + 2 + 0) / 3 / 5)
    assert metrics["unparsed"] == 3 / 8
    assert metrics["score_attribute"] == 6 and metrics["score_relation"] == 0
    # As published: "**rating**: 3" and "rating: [2]" and two ratings are 0, and so is no answer.
    assert metrics["published_score"] == (6 + 4) / 8
    assert metrics["published_hallucination_rate"] == 6 / 8


def test_a_type_whose_answers_cannot_be_read_has_no_score(tmp_path):
    metrics = metrics_of(MMHAL, mmhal_folder(tmp_path), ["A dog."] * 8, ["?"] * 8)
    assert metrics["score"] != metrics["score"], "NaN, not 0"
    assert metrics["unparsed"] == 1 and metrics["published_score"] == 0


def test_only_the_judge_of_mmhal_v_sees_the_image(tmp_path):
    question = MMHAL.read(mmhal_folder(tmp_path))[0]
    reply = record(question, "A cat. {reference}")
    text_only = MMHAL.judging.request(question, reply)
    assert "Objects in the image: Dog, Ball" in text_only.text and "Reference answer: A dog." in text_only.text
    assert "A cat. {reference}" in text_only.text, "a reply cannot name a place of the template"
    assert text_only.images == () and MMHAL_V.judging.request(question, reply).images == question.images
    assert MMHAL.judging.digest != MMHAL_V.judging.digest


def test_mmhal_in_another_order_is_refused(tmp_path):
    mmhal_folder(tmp_path)
    file = tmp_path / "mmhal" / "response_template.json"
    records = json.loads(file.read_text())
    write_json(file, records[::-1])
    with pytest.raises(ValueError, match="record 0 has the type 'other'; as published it is 'attribute'"):
        MMHAL.read(tmp_path)


def coco_folder(data):
    folder = data / "llava-bench-coco"
    write_lines(
        folder / "qa90_questions.jsonl",
        [
            {"question_id": number, "image": "a.jpg", "text": f"Why? {number}", "category": category}
            for number, category in enumerate(("conv", "detail", "complex"))
        ],
    )
    write_lines(folder / "qa90_gpt4_answer.jsonl", [{"question_id": n, "text": f"Because {n}."} for n in range(3)])
    context = {
        "id": 1,
        "image": "a.jpg",
        "captions": ["A dog."],
        "instances": [{"category": "dog", "bbox": [0, 0, 1, 1]}],
    }
    write_lines(folder / "caps_boxes_coco2014_val_80.jsonl", [context])
    write_image(data / "val2014" / "a.jpg")
    return data


def test_llava_bench_is_a_ratio_of_means(tmp_path):
    answers = ["8 6\nfine", "10, 5", "The first gets 8."]
    metrics = metrics_of(COCO, coco_folder(tmp_path), ["x"] * 3, answers)
    assert metrics["score"] == (6 + 5) / (8 + 10)
    assert metrics["score_conv"] == 6 / 8 and metrics["score_detail"] == 1 / 2
    assert metrics["score_complex"] != metrics["score_complex"], "NaN"
    assert metrics["unparsed"] == 1 / 3
    assert metrics["published_score"] == (6 + 5 - 1) / (8 + 10 - 1)


def test_llava_bench_shows_captions_and_boxes_as_context(tmp_path):
    question = COCO.read(coco_folder(tmp_path))[0]
    text = COCO.judging.request(question, record(question, "It is.")).text
    assert "[Context]\nA dog.\ndog: [0, 0, 1, 1]" in text
    assert "[Assistant 1]\nBecause 0." in text and "[Assistant 2]\nIt is." in text


def test_llava_bench_in_the_wild_reads_its_files(tmp_path):
    folder = tmp_path / "llava-bench-in-the-wild"
    write_lines(
        folder / "questions.jsonl", [{"question_id": 0, "image": "001.jpg", "text": "Where?", "category": "conv"}]
    )
    write_lines(folder / "answers_gpt4.jsonl", [{"question_id": 0, "text": "Hawaii."}])
    write_lines(folder / "context.jsonl", [{"id": 0, "image": "001.jpg", "caption": "An island."}])
    write_image(folder / "images" / "001.jpg")
    assert metrics_of(IN_THE_WILD, tmp_path, ["There."], ["8 9"])["score"] == 9 / 8
    write_lines(folder / "context.jsonl", [{"id": 0, "image": "002.jpg", "caption": "An island."}])
    with pytest.raises(ValueError, match="there is no context for '001.jpg'"):
        IN_THE_WILD.read(tmp_path)
