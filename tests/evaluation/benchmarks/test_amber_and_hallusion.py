import pytest

from tests.evaluation.helpers import metrics_of, record, write_image, write_json
from trl_vlm.evaluation.benchmarks.amber import AMBER, scorer
from trl_vlm.evaluation.benchmarks.hallusion import HALLUSION

TYPES = ["discriminative-hallucination", "discriminative-attribute-state", "discriminative-relation"]


def amber_folder(data, discriminative=True):
    folder = data / "amber"
    write_json(folder / "query" / "query_generative.json",
               [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}])  # fmt: skip
    annotations = [{"id": 1, "type": "generative", "truth": ["dog", "grass"], "hallu": ["ball"]}]
    if discriminative:
        queries = [{"id": 2 + n, "image": "AMBER_1.jpg", "query": f"Is it {n}?"} for n in range(3)]
        write_json(folder / "query" / "query_discriminative.json", queries)
        annotations += [{"id": 2 + n, "type": name, "truth": "no" if n else "yes"} for n, name in enumerate(TYPES)]
    write_json(folder / "annotations.json", annotations)
    relations = {"dog": ["puppy"], "grass": ["lawn"], "ball": ["frisbee"], "cat": [], "car": [], "scene": []}
    write_json(folder / "relation.json", relations)
    (folder / "safe_words.txt").write_text("scene\n")
    write_image(folder / "images" / "AMBER_1.jpg")
    return data


def test_amber_with_hand_counted_numbers(tmp_path):
    reply = "The scene shows two puppies with a frisbee and a car."
    metrics = metrics_of(AMBER, amber_folder(tmp_path), [reply, "Yes", "Yes.", "No, it is not."])
    # Nouns of the table: scene (safe), puppy (covers dog), frisbee (expected invention), car.
    assert metrics["chair"] == 2 / 4 and metrics["cover"] == 1 / 2
    assert metrics["hal"] == 1 and metrics["cog"] == 1
    # "no" is the positive class: two gold, one said, one right.
    assert metrics["accuracy"] == 2 / 3 and metrics["precision"] == 1 and metrics["recall"] == 1 / 2
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["relation_f1"] == 1 and metrics["attribute_recall"] == 0 and metrics["existence_accuracy"] == 1
    assert metrics["score"] == pytest.approx((1 - 0.5 + 2 / 3) / 2)


def test_ambers_generative_part_alone(tmp_path):
    metrics = metrics_of(AMBER, amber_folder(tmp_path, discriminative=False), ["A dog on the lawn."])
    assert metrics["chair"] == 0 and metrics["cover"] == 1 and metrics["hal"] == 0
    assert "f1" not in metrics and "score" not in metrics


def test_ambers_similarity_of_words_is_pluggable(tmp_path):
    (question,) = AMBER.read(amber_folder(tmp_path, discriminative=False))
    score = scorer(lambda one, other: {one, other} == {"cat", "dog"})
    metrics = score([record(question, "A cat and a car.")]).metrics
    assert metrics["chair"] == 1 / 2 and metrics["cover"] == 1 / 2


def hallusion_folder(data):
    rows = []
    for figure, number, answer, visual in ((0, 0, "1", "1"), (0, 1, "0", "1"), (1, 0, "0", "2"), (1, 1, "0", "2")):
        rows.append(
            {"category": "VD", "subcategory": "figure", "visual_input": visual, "set_id": "0",
             "figure_id": str(figure), "question_id": str(number), "question": f"Is it {number}?",
             "gt_answer": answer, "gt_answer_details": "x"}
        )  # fmt: skip
        write_image(data / "hallusion" / "images" / "VD" / "figure" / f"0_{figure}.png")
    rows.append({**rows[0], "category": "VS", "subcategory": "map", "visual_input": "0"})
    write_json(data / "hallusion" / "HallusionBench.json", rows)
    return data


def test_hallusionbench_by_answer_question_and_figure(tmp_path):
    metrics = metrics_of(HALLUSION, hallusion_folder(tmp_path), ["Yes", "No", "Yes, it is", "no", "Who knows"])
    assert metrics["answer_accuracy"] == 3 / 5
    assert metrics["question_accuracy"] == 1 / 3, "right for all its figures; the one without a figure counts too"
    assert metrics["figure_accuracy"] == 1 / 2, "the question without a figure counts not"
    assert metrics["unparsable"] == 1 / 5


def test_a_question_without_a_figure_has_no_image(tmp_path):
    questions = HALLUSION.read(hallusion_folder(tmp_path))
    assert [len(question.images) for question in questions] == [1, 1, 1, 1, 0]
