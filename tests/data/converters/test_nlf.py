import pytest

from tests.data.converters.helpers import NLF_COLUMNS, gpt, human, nlf
from trl_vlm.data.converters import BadRecord, MissingColumns
from trl_vlm.data.converters.nlf import COLUMNS, to_row


def test_named_columns_make_a_preference_row():
    row = to_row(nlf(), **NLF_COLUMNS, critique_column="feedback", score_column="points")
    assert row == {
        "images": ["000000000042.jpg"],
        "prompt": [{"role": "user", "content": "What is in the sink?"}],
        "chosen": [{"role": "assistant", "content": "Two cups."}],
        "rejected": [{"role": "assistant", "content": "Two cups and a knife."}],
        "critique": "There is no knife.",
        "score": "2",
    }
    assert set(row) == set(COLUMNS)
    assert not {"critique", "score"} & set(to_row(nlf(), **NLF_COLUMNS))


def test_without_column_names_the_error_says_what_to_name_and_what_there_is():
    with pytest.raises(ValueError, match=r"--image-column, --question-column.*\['after', 'ask', 'feedback', 'first'"):
        to_row(nlf())


def test_a_wrong_column_name_is_refused_with_the_columns_found():
    with pytest.raises(MissingColumns, match=r"\['picture'\]. Found the columns \['after', 'ask'"):
        to_row(nlf(), **{**NLF_COLUMNS, "image_column": "picture"})


@pytest.mark.parametrize(
    ("value", "image"),
    [
        (9, "000000000009.jpg"),
        ("000000000009", "000000000009.jpg"),
        ("000000000009.jpg", "000000000009.jpg"),
        ("COCO_train2014_000000000009", "COCO_train2014_000000000009.jpg"),
        (b"bytes", b"bytes"),
    ],
)
def test_an_image_id_becomes_the_file_name_of_coco(value, image):
    assert to_row(nlf(pic=value), **NLF_COLUMNS)["images"] == [image]


def test_earlier_turns_of_a_question_are_kept():
    row = to_row(nlf(ask=[human("<image>\nWhat is it?"), gpt("A sink."), human("And in it?")]), **NLF_COLUMNS)
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    with pytest.raises(BadRecord, match="does not end on the user's turn"):
        to_row(nlf(ask=[human("What is it?"), gpt("A sink.")]), **NLF_COLUMNS)


def test_a_reply_that_feedback_did_not_change_is_refused():
    with pytest.raises(BadRecord, match="chosen and rejected are the same"):
        to_row(nlf(first="Two cups."), **NLF_COLUMNS)
