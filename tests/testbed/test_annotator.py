import numpy as np
import pytest

from trl_vlm.testbed.annotator import Annotator
from trl_vlm.testbed.sentences import Statement

WRONG_TWICE = "there is a cup . i see a kite . there is a dog . i see a bat ."


def truth(*kinds):
    return [Statement(kind) for kind in kinds]


def corrected(reply, *kinds, seed=0, **options):
    return Annotator(**options)(reply, truth(*kinds), np.random.default_rng(seed))


def marked(reply, spans):
    return [reply[start:end] for start, end in spans]


@pytest.mark.parametrize(
    "reply, kinds, expected",
    [
        (WRONG_TWICE, ("cup", "tree", "dog"), "there is a cup . i see a tree . there is a dog ."),
        ("i see a kite .", ("cup", "dog"), "i see a cup ."),
        ("i see a cup . i see a cup . i see a", ("cup",), "i see a cup ."),
        ("i see a cup . there is a cup .", ("dog", "cup"), "i see a cup . there is a dog ."),
        ("i see a kite . there is a cup .", ("cup",), "there is a cup ."),
    ],
)
def test_the_oracle_replaces_what_is_wrong_by_what_was_left_out_and_else_removes_the_sentence(reply, kinds, expected):
    assert corrected(reply, *kinds).chosen == expected


def test_replies_without_an_error_and_corrections_without_a_word_give_nothing():
    assert corrected(WRONG_TWICE, "cup", "bat", "dog", "kite") is None
    assert corrected("there is a cup . there is a .", "cup") is None  # names nothing wrong
    assert corrected("i see a kite . i see a kite .", "kite", "kite").chosen == "i see a kite ."
    assert corrected("", "cup") is None


def test_spans_mark_what_was_wrong_and_what_took_its_place():
    found = corrected(WRONG_TWICE, "cup", "tree", "dog")
    assert marked(WRONG_TWICE, found.rejected_spans) == ["kite", "i", "see", "a", "bat"]  # replaced; removed
    assert marked(found.chosen, found.chosen_spans) == ["tree"]


def test_an_annotator_who_notices_one_error_leaves_the_other_as_it_is():
    seen = [corrected(WRONG_TWICE, "cup", "tree", "dog", seed=seed, noticed=1) for seed in range(8)]
    assert {found.chosen for found in seen} == {
        "there is a cup . i see a tree . there is a dog . i see a bat .",
        "there is a cup . i see a kite . there is a dog . i see a tree .",
    }
    for found in seen:
        assert marked(found.chosen, found.chosen_spans) == ["tree"]
        assert marked(WRONG_TWICE, found.rejected_spans) in (["kite"], ["bat"])


def test_what_is_not_looked_at_stays_even_if_it_is_unfinished():
    found = corrected("i see a kite . there is a", "cup", noticed=1)
    assert found.chosen == "i see a cup . there is a"
    assert corrected("i see a kite . there is a", "cup").chosen == "i see a cup ."


def test_an_annotator_with_a_style_rewords_what_needs_no_correction_and_spans_do_not_mark_it():
    reply = "i see a cup . i see a kite . there is a dog ."
    found = corrected(reply, "cup", "tree", "dog", reworded=1.0)
    assert found.chosen == "there is a cup . i see a tree . there is a dog ."
    assert marked(found.chosen, found.chosen_spans) == ["tree"]
    assert marked(reply, found.rejected_spans) == ["kite"]


def test_sentences_are_reworded_as_often_as_stated():
    rng = np.random.default_rng(0)
    reply = "i see a cup . i see a kite ."
    annotate = Annotator(reworded=0.3)
    changed = ["there is a cup" in annotate(reply, truth("cup", "tree"), rng).chosen for _ in range(1000)]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.05)


def test_wrong_attributes_are_replaced_and_marked_word_by_word():
    true = [Statement("cup", "small", "red", "on the left"), Statement("dog", "large", "blue", "in the middle")]
    reply = "i see a large red cup on the right . there is a small green kite on the left ."
    found = Annotator()(reply, true, np.random.default_rng(0))
    assert found.chosen == "i see a small red cup on the left . there is a large blue dog in the middle ."
    assert marked(reply, found.rejected_spans) == ["large", "right", "small", "green", "kite", "on", "left"]
    assert marked(found.chosen, found.chosen_spans) == ["small", "left", "large", "blue", "dog", "in", "middle"]


def test_a_broken_sentence_about_something_that_is_there_is_completed():
    true = [Statement("cup", "small", "red", "on the left")]
    found = Annotator()("i see a small cup .", true, np.random.default_rng(0))
    assert found.chosen == "i see a small red cup on the left ."
    assert marked("i see a small cup .", found.rejected_spans) == ["i", "see", "a", "small", "cup"]


@pytest.mark.parametrize("options, message", [({"noticed": 0}, "noticed=0"), ({"reworded": 1.5}, "reworded=1.5")])
def test_an_annotator_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Annotator(**options)
