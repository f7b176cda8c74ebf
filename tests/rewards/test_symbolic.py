import pytest

from trl_vlm.rewards import SymbolicCorrectness, option_letter, yes_or_no


def correctness(reply: str, gold: str | None, rule: str = "words") -> float:
    completion = [{"role": "assistant", "content": reply}]
    return SymbolicCorrectness(rule)([[]], [completion], answer=[gold])[0]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        (" **No**, there is none.", "no"),
        ("YES, a dog.", "yes"),
        ("The answer is no.", "no"),
        ("Answer: yes", "yes"),
        ("Not sure", None),
        ("Nobody is there.", None),
        ("Notice the dog.", None),
        ("Yesterday", None),
        ("No doubt there is one.", None),
        ("No idea.", None),
        ("There is a dog.", None),
        ("", None),
    ],
)
def test_yes_and_no_are_read_as_whole_words(reply, said):
    assert yes_or_no(reply) == said


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        ("a)", "A"),
        ("(A)", "A"),
        ("A.", "A"),
        ("B: a cat", "B"),
        ("(b) a cat", "B"),
        ("The correct option is A.", "A"),
        ("the CORRECT OPTION IS a.", "A"),
        ("The best choice is **C**", "C"),
        ("Option D", "D"),
        ("The answer is B because of the cat.", "B"),
        ("A. cat B. dog. The correct option is B.", "B"),
        ("The correct option is A. The correct option is B.", None),
        ("A cat", None),
        ("The answer is a cat.", None),
        ("The options.", None),
        ("a.m. or p.m.", None),
        ("I think so.", None),
        ("", None),
    ],
)
def test_an_option_is_read_in_the_forms_that_models_write(reply, letter):
    assert option_letter(reply) == letter


@pytest.mark.parametrize(
    ("reply", "gold", "value"),
    [
        ("Yes.", "yes", 0.5),
        ("No.", "yes", -0.5),
        ("No.", "No", 0.5),
        ("yes", "no", -0.5),
        ("Not sure", "no", 0.0),
        ("Nobody", "no", 0.0),
        ("a)", "A", 1.0),
        ("b) a dog", "A", 0.0),
        ("The correct option is A.", "(a)", 1.0),
        ("Two  dogs.", "two dogs", 1.0),
        ("Two cats.", "two dogs", 0.0),
        ("anything", None, 0.0),
    ],
)
def test_the_default_rule(reply, gold, value):
    assert correctness(reply, gold) == value


@pytest.mark.parametrize(
    ("reply", "gold", "value"),
    [
        ("No, it is not.", "no", 0.5),
        ("Not sure", "no", 0.5),
        ("Nobody", "no", 0.5),
        ("Yes", "no", -0.5),
        ("no", "no", 0.0),
        ("There is none.", "no", 0.0),
        ("Yes", "yes", 0.0),
        ("No", "yes", 0.0),
        (" A. a cat", "A", 1.0),
        ("So the correct option is A.", "A", 1.0),
        ("A. The correct option is B.", "B", 1.0),
        ("a) a cat", "A", 0.0),
        ("A", "A", 0.0),
        ("two dogs", "two dogs", 0.0),
        ("anything", None, 0.0),
    ],
)
def test_the_published_rule_is_the_published_table(reply, gold, value):
    assert correctness(reply, gold, rule="published") == value


def test_rows_are_scored_apart_and_in_order():
    replies = [[{"role": "assistant", "content": text}] for text in ("Yes", "B.", "No")]
    assert SymbolicCorrectness()([[]] * 3, replies, answer=["yes", "A", None]) == [0.5, 0.0, 0.0]


def test_a_missing_column_and_an_unknown_rule_are_errors():
    with pytest.raises(ValueError, match="needs the column `answer`"):
        SymbolicCorrectness()([[]], [[{"role": "assistant", "content": "Yes"}]])
    with pytest.raises(ValueError, match="`rule` is 'strict'; choose one of 'words', 'published'"):
        SymbolicCorrectness("strict")


@pytest.mark.parametrize("gold", [3, True, " "])
def test_a_gold_answer_that_is_no_text_names_its_row(gold):
    replies = [[{"role": "assistant", "content": "Yes"}]] * 2
    with pytest.raises(TypeError, match="row 1: the gold `answer` is"):
        SymbolicCorrectness()([[]] * 2, replies, answer=["yes", gold])
