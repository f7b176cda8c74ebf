import random

import pytest

from trl_vlm.evaluation.scoring import json_list, published_rating, published_two_numbers, rating, two_numbers

RATINGS = {
    "Rating: 4": 4, "It is right.\nRating: 0": 0, "**Rating**: 4": 4, "Rating: [4]": 4, "rating: 6.": 6,
    "**Rating: 5**": 5,
    "Rating: 4\n": 4, "Rating: 4\n\nRating: 4": 4,
    "": None, "4": None, "Rating 4": None, "Rating: four": None, "Rating: 7": None, "Rating: 10": None,
    "Rating: -1": None,
    "Rating: 4.5": None, "Rating: 4/6": None, "Rating: 4 or 5": None, "Rating: 4\nRating: 2": None, "Rating:": None,
    "Rating: 4\nbecause it is good": None, "The rating: 4": None, "Rating: 3-4": None, "Rating: ４": None,
    "Rating: x 4": None,
    "Rating: 4 - no, 5": None,
}  # fmt: skip


@pytest.mark.parametrize(("answer", "points"), RATINGS.items())
def test_a_rating_is_read_in_the_form_that_was_asked_for_and_in_no_other(answer, points):
    assert rating(answer) == points


def test_the_published_reading_of_ratings():
    assert published_rating("I think.\nRating: 4") == 4
    assert published_rating("**Rating**: 4") == 0
    assert published_rating("Rating: 6 is too much, Rating: 3") == 0
    assert published_rating(None) == 0 and published_rating("Rating: 45") == 4


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [("8 9", (8, 9)), ("8.5, 10\nwhy", (8.5, 10)), ("8,9", (8, 9)), ("8 9 10", None), ("8", None), ("0 9", None),
     ("8 11", None), ("-8 9", None), ("Assistant 1: 8", None), ("", None), ("\n8 9", (8, 9)), ("nan 8", None),
     ("8/10 9/10", None)],
)  # fmt: skip
def test_two_numbers_are_the_first_line_and_nothing_else(answer, numbers):
    assert two_numbers(answer) == numbers


def test_the_published_reading_of_two_numbers():
    assert published_two_numbers("8, 9\nx") == (8, 9)
    assert published_two_numbers("The scores are 8 9") == (-1, -1) == published_two_numbers(None)


@pytest.mark.parametrize(
    ("answer", "items"),
    [('["dog", "cat"]', ["dog", "cat"]), ("[]", []), ('```json\n["dog"]\n```', ["dog"]), ('Here:\n["dog"]', ["dog"]),
     ("dog, cat", None), ('["dog", 3]', None), ('{"a": []}', None), ('["dog"', None), ("", None), (None, None),
     ('["dog"] and more', None), ("[" * 100_000, None)],
)  # fmt: skip
def test_a_list_is_json_and_nothing_else(answer, items):
    assert json_list(answer) == items


def faulty(rng: random.Random) -> str:
    """An answer that holds numbers and brackets, and not what was asked for."""
    points = rng.choice(["7", "-2", "11", "4.5", "5/6", "3 or 4", "four", "", "?", "4 5 6", "x4", "4x", "０"])
    words = rng.choice(["Rating", "Score", "rating", "Better", "Points", "*Rating*", "The rating", "Final"])
    mark = rng.choice([": ", " ", " = ", ":\n", " is ", ": : "])
    tail = rng.choice(["", "\nThank you.", " because it is wrong", "\n[dog, cat]", '\n["dog"', "\n{'a': 1}"])
    head = rng.choice(["", "I see 3 dogs.\n", "Let me think: 8 and 9.\n", "1. First\n2. Second\n"])
    return f"{head}{words}{mark}{points}{tail}"


def test_ten_thousand_faulty_answers_give_no_score():
    rng = random.Random(0)
    answers = [faulty(rng) for _ in range(10_000)]
    assert len(set(answers)) > 3000
    invented = [a for a in answers if rating(a) is not None or two_numbers(a) is not None or json_list(a) is not None]
    assert invented == []
