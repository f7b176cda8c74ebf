import pytest

from tests.data.converters.helpers import annotation, vlfeedback
from trl_vlm.data.converters import BadRecord, MissingColumns
from trl_vlm.data.converters.vlfeedback import COLUMNS, to_rows


def pairs(converted):
    return [(row["chosen_model"], row["rejected_model"], row["score_gap"]) for row in converted.rows]


FOUR = [("5", "5", "5"), ("4", "5", "3"), ("3", "3", "3"), ("1", "2", "3")]  # means 5, 4, 3, 2


def test_four_rated_replies_make_six_pairs_with_their_gaps():
    converted = to_rows(vlfeedback(FOUR))
    assert pairs(converted) == [
        ("model-0", "model-1", 1.0),
        ("model-0", "model-2", 2.0),
        ("model-0", "model-3", 3.0),
        ("model-1", "model-2", 1.0),
        ("model-1", "model-3", 2.0),
        ("model-2", "model-3", 1.0),
    ]
    assert not converted.dropped
    first = converted.rows[0]
    assert set(first) == set(COLUMNS)
    assert first["prompt"] == [{"role": "user", "content": "What colour is the bus?"}]
    assert (first["chosen"][0]["content"], first["rejected"][0]["content"]) == ("Answer 0.", "Answer 1.")
    assert first["images"] == ["/somewhere/else/svit/bus.png"]


def test_the_better_reply_is_chosen_wherever_it_stands():
    assert pairs(to_rows(vlfeedback(FOUR[::-1][:2]))) == [("model-1", "model-0", 1.0)]


def test_ties_make_no_pair_and_are_counted():
    converted = to_rows(vlfeedback([("3", "3", "3"), ("2", "3", "4"), ("5", "5", "5")]))
    assert pairs(converted) == [("model-2", "model-0", 2.0), ("model-2", "model-1", 2.0)]
    assert converted.dropped == {"tie": 1}


@pytest.mark.parametrize("rating", ["N/A", "", None, "nan", "4/5", "7", [4]])
def test_a_reply_whose_rating_is_no_number_is_left_out_and_counted(rating):
    converted = to_rows(vlfeedback([("5", "5", "5"), ("4", rating, "4"), ("1", "1", "1")]))
    assert pairs(converted) == [("model-0", "model-2", 4.0)]
    assert converted.dropped == {"rating is not a number from 1 to 5": 1}


def test_ratings_may_be_numbers_and_an_aspect_may_be_absent():
    record = vlfeedback([(5, 4.0, " 3 "), ("1", "1", "1")])
    assert pairs(to_rows(record)) == [("model-0", "model-1", 3.0)]
    del record["completions"]["annotations"][0]["Visual Faithfulness"]
    assert to_rows(record).dropped == {"rating is not a number from 1 to 5": 1}


def test_the_largest_gap_alone_can_be_kept():
    converted = to_rows(vlfeedback(FOUR), pairs="largest-gap")
    assert pairs(converted) == [("model-0", "model-3", 3.0)]
    assert converted.dropped == {"pair with a smaller gap than the record's largest": 5}


def test_small_gaps_can_be_dropped():
    converted = to_rows(vlfeedback(FOUR), min_gap=2)
    assert [gap for *_, gap in pairs(converted)] == [2.0, 3.0, 2.0]
    assert converted.dropped == {"gap below 2": 3}


def test_one_aspect_alone_can_decide():
    converted = to_rows(vlfeedback(FOUR), aspects=["Visual Faithfulness"])
    assert len(converted.rows) == 3
    assert converted.dropped == {"tie": 3}


def test_completions_may_be_a_list_of_dictionaries():
    record = vlfeedback(FOUR)
    as_lists = record["completions"]
    as_dictionaries = [dict(zip(as_lists, values, strict=True)) for values in zip(*as_lists.values(), strict=True)]
    assert to_rows({**record, "completions": as_dictionaries}).rows == to_rows(record).rows


def test_empty_and_equal_replies_make_no_pair():
    converted = to_rows(vlfeedback(FOUR, responses=["Same.", "Same.", " ", "Other."]))
    assert pairs(converted) == [("model-0", "model-3", 3.0), ("model-1", "model-3", 2.0)]
    assert converted.dropped == {"empty reply": 1, "chosen and rejected are the same": 1}


@pytest.mark.parametrize(
    ("completions", "fault"),
    [
        ({"model": [], "response": []}, "completions lacks a field"),
        ([{"model": "m"}], "completions lacks a field"),
        ("text", "neither a list nor a dictionary"),
        ({"annotations": [annotation("1", "1", "1")], "model": ["m"], "response": ["a", "b"]}, "different lengths"),
    ],
)
def test_odd_completions_are_refused(completions, fault):
    with pytest.raises(BadRecord, match=fault):
        to_rows(vlfeedback(FOUR, completions=completions))


def test_unknown_options_and_schemas_are_refused():
    with pytest.raises(ValueError, match="must be one of all, largest-gap"):
        to_rows(vlfeedback(FOUR), pairs="best")
    with pytest.raises(ValueError, match="choose one or more of Helpfulness"):
        to_rows(vlfeedback(FOUR), aspects=["Beauty"])
    record = vlfeedback(FOUR)
    del record["img_path"]
    with pytest.raises(MissingColumns, match="needed are \\['img_path'\\]"):
        to_rows(record)
    assert to_rows({**record, "image": b"x"}).rows[0]["images"] == [b"x"]
