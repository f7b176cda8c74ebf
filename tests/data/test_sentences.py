import random

import pytest

from trl_vlm.data.sentences import (
    first_sentence,
    maybe_swapped,
    pivots,
    sentence_end,
    split_sentences,
    swap_yes_no,
)

SENTENCES = {
    "decimals": ["It is 3.5 m long, i.e. a lion. ", "It costs $4.00. ", "Fine."],
    "abbreviations": ["Mr. Smith met Dr. Who at 3 p.m. in St. Ives. ", "The U.S. Army, etc. and so on."],
    "a number or an answer": ["No. ", "It is No. 5. ", "Yes."],
    "an abbreviation at an end": ["It has cats, dogs, etc. ", "The sun sets at 5 p.m. ", "Then it is dark."],
    "initials": ["John F. Kennedy and J. K. Rowling sit. ", "The answer is B. ", "The cat is red."],
    "lists": ["It shows:\n\n", "1. A cat. ", "It sleeps.\n", "2. A dog\n", "- one more\n", "* **Bird**: red."],
    "paragraphs": ["A cat sleeps.\n\n", "A dog runs.\r\n", "The end"],
    "a wrapped line": ["A cat\nsleeps on a bench.\n", "A dog runs."],
    "quotes": ['"Really?" he asked. ', 'The sign says "Stop." ', "“Go!” ", "End."],
    "brackets": ["(It is red.) ", "**Bold.** ", "[A cat.] ", "End."],
    "addresses": ["See www.site.org/a.html or a.jpg. ", "Write to me@site.org! ", "Why?"],
    "marks in a row": ["What?! ", "He left... and came. ", "Wait... ", "Really…"],
    "full-width marks": ["这里有一只猫。", "它是红色的！", "“真的？”", "はい。", "네. ", "बस"],
    "small letters": ["i see a cup . ", "i see a plate . ", "no ."],
    "no end": ["A red cat on a bench"],
    "marks alone": ["... ", "A cat."],
    "white space around": ["  A cat.  \n ", "A dog. \t"],
    "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("sentences", SENTENCES.values(), ids=SENTENCES)
def test_a_text_falls_into_its_sentences_and_joins_again(sentences):
    if sentences[:1] == ["... "]:
        sentences = ["... A cat."]  # a piece without a word is no sentence
    assert split_sentences("".join(sentences)) == sentences


def test_any_text_joins_again():
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(
            draw.choices(["a", "B", "No", "3", " ", "\n", ".", "!", "。", '"', ")", "- ", "etc", "猫"], k=30)
        )
        pieces = split_sentences(text)
        assert "".join(pieces) == text
        assert all(piece.strip() for piece in pieces) or not text.strip()


@pytest.mark.parametrize(
    "text", ["A cat 3.", "A cat 3. ", 'He said "Stop.', "A cat.\n", "A cat", "Mr. Smith", "a, e.g."]
)
def test_an_unfinished_text_has_no_certain_end(text):
    assert sentence_end(text, is_complete=False) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("A cat. T", "A cat."),
        ("It is 3.5 m. A", "It is 3.5 m."),
        ('He said "Stop." T', 'He said "Stop."'),
        ("A cat\n\nT", "A cat"),
        ("猫。它", "猫。"),
    ],
)
def test_an_end_is_certain_once_something_follows(text, sentence):
    assert text[: sentence_end(text, is_complete=False)] == sentence
    assert first_sentence(text) == sentence


def test_generating_letter_by_letter_stops_where_the_whole_text_is_split():
    for text in map("".join, SENTENCES.values()):
        sentences = split_sentences(text)
        ends = (sentence_end(text[:length], is_complete=False) for length in range(len(text) + 1))
        found = next((end for end in ends if end is not None), None)
        assert (found is None) == (len(sentences) < 2)
        assert found is None or text[:found] == sentences[0].rstrip()


def test_cuts_lie_behind_every_word_but_the_last():
    def cuts(sentence):
        return [sentence[:pivot] for pivot in pivots(sentence)]

    assert cuts("A cat's red-brown fur.") == ["A", "A cat's", "A cat's red-brown"]
    assert cuts("2. A cat sleeps.") == ["2. A", "2. A cat"]
    assert cuts("At 3.5 p.m. it rains.") == ["At", "At 3.5", "At 3.5 p.m. it"]
    assert cuts("Yes.") == cuts("B.") == cuts("...") == cuts("") == []
    assert cuts("红色的猫。") == ["红", "红色", "红色的"]


@pytest.mark.parametrize(
    ("sentence", "swapped"),
    [
        ("Yes, there is.", "No, there is."),
        ("yes", "no"),
        ("  No.", "  Yes."),
        ("NO!", "YES!"),
        ("no cat", "yes cat"),
        *[(same, same) for same in ("Nobody is there.", "Notice it.", "Yesterday.", "Not now.", "No one.", "A yes.")],
        *[(same, same) for same in ("No-one.", "Yes-man.", "", "North.", "yesterday")],
    ],
)
def test_yes_and_no_are_swapped_as_whole_words_and_keep_their_case(sentence, swapped):
    assert swap_yes_no(sentence) == swapped


def test_half_of_the_answers_are_swapped():
    draw = random.Random(1)
    swapped = sum(maybe_swapped("Yes.", draw) == "No." for _ in range(2000))
    assert abs(swapped - 1000) < 3 * 500**0.5
