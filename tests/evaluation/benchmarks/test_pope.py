import json

import datasets
import pytest

from tests.evaluation.helpers import metrics_of, pope_folder, write_image, write_lines
from trl_vlm.evaluation import pope
from trl_vlm.evaluation.benchmarks.pope import POPE, POPE_V2, published_yes_or_no


def test_hand_counted_splits_and_their_mean(tmp_path):
    pope_folder(tmp_path)
    # random: yes no yes no (all right); popular: yes yes yes yes; adversarial: "Yes." "No, there is no cat." no maybe
    replies = ["yes", "no", "yes", "no", *["yes"] * 4, "Yes.", "No, there is no cat.", "no", "It may be."]
    metrics = metrics_of(POPE, tmp_path, replies)
    assert [metrics[f"{split}_accuracy"] for split in ("random", "popular", "adversarial")] == [1, 0.5, 0.5]
    assert metrics["random_f1"] == 1 and metrics["popular_f1"] == pytest.approx(2 / 3)
    assert metrics["adversarial_f1"] == pytest.approx(2 * 1 / (1 + 2))
    assert metrics["mean_accuracy"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert metrics["mean_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert metrics["accuracy"] == 8 / 12 and metrics["questions"] == 12
    assert metrics["adversarial_unparsable"] == 0.25 and metrics["yes_rate"] == 7 / 12
    # The published reading makes a yes of "It may be.".
    assert metrics["adversarial_published_yes_rate"] == 0.5
    assert metrics["adversarial_published_accuracy"] == 0.5


def test_the_benchmark_and_the_metric_agree(tmp_path):
    questions = POPE.read(pope_folder(tmp_path))
    replies = ["Yes", "no", "No.", "perhaps", "yes"] + ["no"] * 7
    metrics = metrics_of(POPE, tmp_path, replies)
    expected = pope(replies, [q.truth["answer"] for q in questions], [q.truth["category"] for q in questions])
    for category, scores in expected.items():
        prefix = "" if category == "all" else f"{category}_"
        for name in ("accuracy", "precision", "recall", "f1", "yes_rate", "unparsable"):
            assert metrics[f"{prefix}{name}"] == pytest.approx(getattr(scores, name)), (category, name)


@pytest.mark.parametrize(
    ("reply", "said"),
    [("Yes.", "yes"), ("No, there is no dog.", "no"), ("There is not. Yes", "no"), ("Perhaps", "yes"),
     ("Yes. But not here", "yes"), ("NO", "yes")],
)  # fmt: skip
def test_the_published_reading(reply, said):
    assert published_yes_or_no(reply) == said


def test_questions_of_one_image_are_one_group(tmp_path):
    questions = POPE.read(pope_folder(tmp_path, images=2))
    assert len(questions) == 12 and len({question.group for question in questions}) == 2
    assert len({question.id for question in questions}) == 12
    assert POPE.prompt(questions[0]) == "Is there a dog in the image?"
    assert "single word" in POPE.prompt(questions[0], "short")
    with pytest.raises(ValueError, match="pope has no prompt form 'other'"):
        POPE.prompt(questions[0], "other")


def test_the_files_of_the_hub_are_read(tmp_path):
    image = {"bytes": write_image(tmp_path / "a.png").read_bytes(), "path": None}
    rows = [
        {"question_id": "1", "question": "Is there a dog?", "answer": "yes", "image_source": "a", "image": image,
         "category": "popular"},
    ]  # fmt: skip
    (tmp_path / "pope").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pope" / "test.parquet")
    (question,) = POPE.read(tmp_path)
    assert question.truth == {"answer": "yes", "category": "popular"} and question.images[0]["bytes"]
    assert metrics_of(POPE, tmp_path, ["Yes"])["popular_f1"] == 1


def test_pope_v2_asks_about_a_photograph_and_its_edit(tmp_path):
    records = [
        {"image_id": 5, "image_name": name, "target_object": "dog", "query": "Is there a dog?", "label": label}
        for name, label in (("a.jpg", "Yes"), ("b.jpg", "No"))
    ]
    write_lines(tmp_path / "pope-v2" / "pairs.jsonl", records)
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / "pope-v2" / "images" / name)
    assert len({question.group for question in POPE_V2.read(tmp_path)}) == 1
    assert metrics_of(POPE_V2, tmp_path, ["yes", "yes"])["accuracy"] == 0.5


def test_what_is_missing_or_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match="pope: there is no coco_pope_"):
        POPE.read(tmp_path)
    file = write_lines(tmp_path / "pope" / "coco_pope_random.json", [{"question_id": 1, "text": "?", "label": "yes"}])
    with pytest.raises(ValueError, match=r"record 0 lacks \['image'\]"):
        POPE.read(tmp_path)
    bad = {"question_id": 1, "text": "?", "label": "yes", "image": "a.jpg"}
    file.write_text(json.dumps(bad))
    with pytest.raises(ValueError, match="pope: there is no image 'a.jpg'"):
        POPE.read(tmp_path)
    file.write_text(json.dumps({**bad, "image": "../a.jpg"}))
    with pytest.raises(ValueError, match="not a path below the data folder"):
        POPE.read(tmp_path)
    write_image(tmp_path / "images" / "a.jpg")
    file.write_text(json.dumps({**bad, "label": "maybe"}))
    with pytest.raises(ValueError, match="has the label 'maybe'"):
        POPE.read(tmp_path)
