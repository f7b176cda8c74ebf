import pytest

from trl_vlm.testbed.sentences import SENTENCES, Statement, read_phrase, read_sentence, statements


@pytest.mark.parametrize("wording", SENTENCES)
@pytest.mark.parametrize("said", [Statement("cup"), Statement("dog", "large", "green", "in the middle")])
def test_a_sentence_reads_as_what_it_was_made_of(wording, said):
    assert read_sentence(wording.format(said.phrase)) == said
    assert read_sentence(wording.format(said.phrase).removesuffix(" .")) == said
    assert read_phrase(said.phrase) == said


def test_a_phrase_that_tells_no_statement_is_an_error():
    with pytest.raises(ValueError, match="'red cup' tells no statement"):
        read_phrase("red cup")


@pytest.mark.parametrize(
    "broken",
    [
        "there is a",
        "there is a cup cup",
        "i see a red cup",
        "there is a small red cup",
        "a cup",
        "i see a small cup .",
    ],
)
def test_a_broken_sentence_says_nothing(broken):
    assert read_sentence(broken) is None


def test_the_sentences_of_a_reply_are_read_one_by_one():
    reply = "there is a cup . there is a . i see a large blue dog on the left . there is"
    assert statements(reply) == [Statement("cup"), None, Statement("dog", "large", "blue", "on the left"), None]
