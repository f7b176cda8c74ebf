import pytest

from trl_vlm.data.answers import option_letter, yes_or_no


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Yes, there is.", "yes"),
        ("No. Nobody is there.", "no"),
        ("no", "no"),
        ("**Yes**", "yes"),
        ("The answer is no.", "no"),
        ("Yes, and the dog is brown.", "yes"),
        ("No, no cat is there.", "no"),
        ("No one is visible.", None),
        ("No-one is there.", None),
        ("Yes and no.", None),
        ("Yes, and no: it depends.", None),
        ("yes/no", None),
        ("No or yes", None),
        ("The answer is yes and no.", None),
        ("No doubt it is a cat.", None),
        ("Not sure", None),
        ("Nobody", None),
        ("", None),
    ],
)
def test_a_reply_says_yes_or_no_or_neither(reply, said):
    assert yes_or_no(reply) == said


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("(b) a cat", "B"),
        ("The correct option is A.", "A"),
        ("Option A is wrong. The answer is B.", "B"),
        ("Option A isn't right, so the answer is C.", "C"),
        ("Option A is clearly not it. Option B is incorrect. The answer is (d)", "D"),
        ("Option A is wrong.", None),
        ("(A) is wrong.", None),
        ("Option A. The answer is B.", None),
        ("The answer is a cat", None),
        ("", None),
    ],
)
def test_a_reply_chooses_one_option_or_none(reply, letter):
    assert option_letter(reply) == letter
