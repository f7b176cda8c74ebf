import pytest
from datasets import Dataset

from trl_vlm.evaluation import Arm, markdown_report
from trl_vlm.evaluation.rows import check_scorable_rows, score_rows

ROWS = [
    {"objects": ["cat", "dog"], "answer": None, "category": None},
    {"objects": None, "answer": "Yes", "category": "popular"},
    {"objects": None, "answer": "no", "category": "adversarial"},
    {"objects": None, "answer": "no", "category": "popular"},
]
REPLIES = ["a cat and a bus", "Yes.", "Yes, there is.", "No."]


def find(reply: str) -> list[str]:
    return [word for word in reply.split() if word in ("cat", "dog", "bus")]


def cells(text: str, label: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"| {label}")).strip("|").split("|")


@pytest.mark.parametrize("rows", [ROWS, Dataset.from_list(ROWS)], ids=["list", "dataset"])
def test_chair_and_pope_of_rows_of_ones_own_appear_in_the_report(rows):
    scores = score_rows(rows, REPLIES, find)
    text = markdown_report([Arm("mine", {"evaluation": scores})])
    for label, value in {
        "CHAIR_i (%)": "50.0",
        "object recall": "50.0",
        "POPE accuracy": "66.7",
        "POPE F1": "66.7",
        "POPE popular accuracy": "100.0",
        "POPE popular yes-rate": "50.0",
        "POPE adversarial accuracy": "0.0",
    }.items():
        assert cells(text, label)[1].strip() == value, label


def test_rows_without_categories_have_scores_over_all():
    scores = score_rows([{"answer": "yes"}, {"answer": "no"}], ["yes", "yes"], find)
    assert scores["pope_accuracy"] == 0.5 and not [key for key in scores if "chair" in key or "popular" in key]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"objects": ["cat"]}, {"prompt": "?"}], "evaluation row 1: neither 'objects' nor 'answer'"),
        ([{"objects": "cat"}], "evaluation row 0, column 'objects': 'cat' is not a list"),
        ([{"answer": "maybe"}], "evaluation row 0, column 'answer': 'maybe' is neither"),
    ],
)
def test_rows_that_cannot_be_scored_are_named_before_anything_is_generated(rows, message):
    with pytest.raises(ValueError, match=message):
        check_scorable_rows(rows)


def test_every_row_needs_a_reply():
    with pytest.raises(ValueError, match="1 replies to 4 rows"):
        score_rows(ROWS, ["a"], find)


@pytest.mark.parametrize(
    ("reply", "truth", "chair_i", "recall"),
    [
        ("Two dogs wait at a traffic light near a dining table.", ["dog", "traffic light"], 1 / 3, 1.0),
        ("A dog sits here.", ["Dog"], 0.0, 1.0),
        ("A man rides.", ["person"], 0.0, 1.0),
        ("Two lighthouses and a man", ["Lighthouse"], 1 / 2, 1.0),
    ],
)
def test_objects_are_found_by_class_synonym_plural_and_two_word_name(reply, truth, chair_i, recall):
    scores = score_rows([{"objects": truth}], [reply])
    assert (scores["chair_i"], scores["recall"]) == (pytest.approx(chair_i), recall)
