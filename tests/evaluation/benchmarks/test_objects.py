import base64
import dataclasses

import pytest

from tests.evaluation.helpers import metrics_of, objects_folder, record, write_image, write_lines
from trl_vlm.evaluation import ObjectFinder, chair
from trl_vlm.evaluation.benchmarks.captions import object_ratios
from trl_vlm.evaluation.benchmarks.chair import CHAIR
from trl_vlm.evaluation.benchmarks.object_halbench import OBJECT_HALBENCH


def test_the_three_published_counts_differ_where_they_should():
    found = [ObjectFinder().find("a man and a woman and a dog and a man")]
    ratios = object_ratios(found, [{"dog"}])
    assert ratios["i"].value == 3 / 4, "mentions"
    assert ratios["i_surfaces"].value == 2 / 3, "words, once per reply"
    assert ratios["i_distinct"].value == 1 / 2, "classes, once per reply"


def test_chair_of_hand_counted_captions(tmp_path):
    replies = ["A dog and two cats on a chair.", "A car and a car at a traffic light."]
    metrics = metrics_of(CHAIR, objects_folder(tmp_path), replies)
    # The second image's captions name a man and a car, so that the car is no invention.
    assert metrics["i"] == 2 / 6 and metrics["i_distinct"] == 2 / 5
    assert metrics["s"] == metrics["s_refined"] == 1 / 2
    assert metrics["recall"] == 3 / 4
    assert metrics["length_words"] == 8.5 and metrics["empty"] == metrics["unfinished"] == 0


def test_chair_asks_about_val2014_alone(tmp_path):
    folder = objects_folder(tmp_path)
    rows = (folder / "coco_objects.jsonl").read_text()
    (folder / "coco_objects.jsonl").write_text(rows + rows.replace("val2014", "train2014"))
    assert [question.id for question in CHAIR.read(folder)] == ["7", "9"]


def test_the_benchmark_and_the_metric_agree(tmp_path):
    questions = CHAIR.read(objects_folder(tmp_path))
    replies = ["", "Men, women, and a bus; a bus"]
    metrics = metrics_of(CHAIR, tmp_path, replies)
    expected = chair(replies, [q.truth["objects"] for q in questions], ObjectFinder().names)
    pairs = {"i": "chair_i", "i_distinct": "chair_i_distinct", "s": "chair_s", "s_refined": "chair_s_refined",
             "recall": "recall", "length_words": "length_words", "empty": "empty"}  # fmt: skip
    for name, other in pairs.items():
        assert metrics[name] == pytest.approx(getattr(expected, other)), name


def test_the_unfinished_sentence_of_a_cut_reply_does_not_count(tmp_path):
    first, second = CHAIR.read(objects_folder(tmp_path))
    cut = record(first, "A dog lies here. Beside it is a cat and a", is_finished=False)
    metrics = CHAIR.score([cut, record(second, "A man.")]).metrics
    assert metrics["i"] == 0 and metrics["unfinished"] == 0.5
    assert CHAIR.score([dataclasses.replace(cut, is_finished=None)]).metrics["i"] == 0.5


def test_a_table_of_words_in_the_data_folder_is_used(tmp_path):
    objects_folder(tmp_path)
    (tmp_path / "chair").mkdir()
    (tmp_path / "chair" / "synonyms.txt").write_text("dog, beast\nperson\ntraffic light\n")
    assert metrics_of(CHAIR, tmp_path, ["A beast and a cat", "nothing"])["i"] == 0


def halbench_folder(data):
    image = base64.b64encode(write_image(data / "x.jpg").read_bytes()).decode()
    rows = [
        {"question_id": number, "image_id": image_id, "image": image, "question": "Describe it in detail."}
        for number, image_id in enumerate((7, 9, 7))
    ]
    write_lines(data / "obj_halbench_300_with_image.jsonl", rows)
    return objects_folder(data)


def test_object_halbench_counts_each_word_once_and_unparsed_lists_apart(tmp_path):
    replies = ["A man, a woman, a man and a dog.", "There is a long description here.", "A black dog."]
    answers = ['["man", "woman", "man", "dog"]', "The objects are: bus", '["never asked"]']
    metrics = metrics_of(OBJECT_HALBENCH, halbench_folder(tmp_path), replies, answers)
    assert metrics["i"] == 2 / 3, "two of the three words"
    assert metrics["unparsed"] == 1 / 2, "of the two that were asked about"
    assert metrics["s"] == 1 / 2, "the unparsed one counts nowhere"
    assert metrics["s_refined"] == 1, "one reply names objects, and invents"
    assert metrics["recall"] == 1 / 2, "the dog of the first image, not of the third"


def test_object_halbench_asks_no_judge_about_three_words(tmp_path):
    question = OBJECT_HALBENCH.read(halbench_folder(tmp_path))[0]
    ask = OBJECT_HALBENCH.judging.request
    assert ask(question, record(question, "A black dog")) is None
    request = ask(question, record(question, "A dog sits {question} here."))
    assert "Answer: A dog sits {question} here." in request.text and request.images == ()


def test_missing_annotations_are_named(tmp_path):
    halbench_folder(tmp_path)
    write_lines(tmp_path / "coco_objects.jsonl", [{"images": ["a.jpg"], "objects": [], "image_id": 1}])
    with pytest.raises(ValueError, match="image 7 is not in coco_objects"):
        OBJECT_HALBENCH.read(tmp_path)
