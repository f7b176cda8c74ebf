import pytest

from trl_vlm.evaluation import chair

OBJECTS = {"cat", "dog", "cup", "table"}


def find_objects(reply: str) -> list[str]:
    return [word.strip(".,") for word in reply.split() if word.strip(".,") in OBJECTS]


def test_hand_counted_replies():
    replies = [
        "a cat and a dog and a dog.",  # dog is invented, twice; 8 words with "and"
        "a cup on a table.",  # all shown
        "",  # names nothing
        "nothing here",  # names nothing
    ]
    truths = [{"cat"}, {"cup", "table", "cat"}, {"dog"}, ["cat", "cat"]]
    scores = chair(replies, truths, find_objects)
    assert scores.chair_i == 2 / 5
    assert scores.chair_i_distinct == 1 / 4
    assert scores.chair_s == 1 / 4
    assert scores.chair_s_refined == 1 / 2
    assert scores.recall == 3 / 6
    assert scores.repeats == 1 / 5
    assert scores.length_words == (8 + 5 + 0 + 2) / 4
    assert scores.empty == 1 / 4


def test_silence_scores_no_hallucination_but_no_recall_and_is_seen():
    scores = chair(["", " "], [{"cat"}, {"dog"}], find_objects)
    assert (scores.chair_i, scores.chair_s, scores.chair_s_refined) == (0, 0, 0)
    assert (scores.recall, scores.length_words, scores.empty) == (0, 0, 1)


def test_repeating_what_is_shown_lowers_chair_i_but_not_its_distinct_form():
    plain, repeating = (chair([reply], [{"cat"}], find_objects) for reply in ("cat dog", "cat cat cat dog"))
    assert repeating.chair_i == 1 / 4 < plain.chair_i == 1 / 2
    assert repeating.chair_i_distinct == plain.chair_i_distinct == 1 / 2
    assert (plain.repeats, repeating.repeats) == (0, 1 / 2)


def test_images_that_show_nothing_are_allowed():
    scores = chair(["a cat"], [set()], find_objects)
    assert (scores.chair_i, scores.chair_s, scores.recall) == (1, 1, 0)


@pytest.mark.parametrize(("replies", "truths"), [([], []), (["a cat"], []), (["a", "b"], [{"cat"}])])
def test_replies_and_truths_must_match(replies, truths):
    with pytest.raises(ValueError, match=f"CHAIR got {len(replies)} replies and {len(truths)} truths"):
        chair(replies, truths, find_objects)
