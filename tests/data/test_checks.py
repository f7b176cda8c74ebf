import io
import math

import pytest
from PIL import Image

from trl_vlm.data.checks import check_dataset, row_faults
from trl_vlm.data.errors import RowError
from trl_vlm.data.rows import PURPOSES, check_row


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    return buffer.getvalue()


def cut_short():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, format="PNG")
    return buffer.getvalue()[:1000]


def pair(**changes):
    row = {
        "images": [picture()],
        "prompt": [user("What is it?")],
        "chosen": [assistant("A cup.")],
        "rejected": [assistant("A cup and a fork.")],
        "rejected_extra": [[assistant("A fork.")]],
        "facts": ["It is a cup."],
        "answer": None,
        "margin": 0.5,
        "length_weight": -1,
    }
    return {**row, **changes}


def faults(row, purpose="dpo"):
    return [(problem.column, problem.reason) for problem in check_dataset([row], purpose).problems]


@pytest.mark.parametrize("purpose", ["dpo", "reward", "ppo"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"images": []},
        {"images": None, "image": picture()},
        {"images": [picture(), picture()]},
        {"prompt": [user("What?"), assistant("A cup."), user("Sure?")]},
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]},
        {"rejected_extra": []},
        {"answer": "B", "facts": []},
        {"prompt": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user("What?")]},
        {"chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cup.", "image": None}]}]},
        {
            "prompt": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}
            ]
        },
        {"chosen_spans": [[2, 5]], "rejected_spans": []},
    ],
)
def test_good_rows_have_no_faults(purpose, changes):
    assert faults(pair(**changes), purpose) == []


@pytest.mark.parametrize(
    ("changes", "column", "fault"),
    [
        ({"chosen": None}, "chosen", "it is missing or None. The row has the columns"),
        ({"prompt": "What is it?"}, "prompt", "it is a str. It must be a list of messages"),
        ({"prompt": []}, "prompt", "the list of messages is empty"),
        ({"prompt": [user("What?"), assistant("A cup.")]}, "prompt", "it ends on the assistant's turn"),
        ({"prompt": [user(" ")]}, "prompt", "the last question is empty"),
        ({"prompt": [user("<image>\nWhat?")]}, "prompt", "the user's text has a literal <image>"),
        ({"chosen": [assistant("<|image_pad|>")]}, "chosen", "the assistant's text has a literal <|image_pad|>"),
        ({"chosen": [assistant("")]}, "chosen", "the reply is empty"),
        ({"chosen": [user("A cup.")]}, "chosen", "the reply is the user's"),
        ({"chosen": [{"role": "cat", "content": "Miaow."}]}, "chosen", "is not a message"),
        (
            {"chosen": [{"role": "assistant", "content": None}]},
            "chosen",
            "the content of the assistant turn is a NoneType",
        ),
        ({"rejected": [assistant("A cup. ")]}, "rejected", "it says the same as 'chosen'"),
        ({"rejected_extra": [assistant("A fork.")]}, "rejected_extra", "reply 0: it is a dict"),
        ({"rejected_extra": "A fork."}, "rejected_extra", "it is a str"),
        ({"rejected_extra": [[assistant("A fork.")], None]}, "rejected_extra", "reply 1: it is None"),
        ({"rejected_extra": [[assistant("A cup.")]]}, "rejected_extra", "reply 0: it says the same as 'chosen'"),
        (
            {"chosen_spans": [[0, 3], [2, 9]]},
            "chosen_spans",
            "the span (2, 9) is not inside the reply of 6 characters",
        ),
        ({"rejected_spans": [[3, 3]]}, "rejected_spans", "the span (3, 3) is not inside the reply"),
        ({"rejected_spans": [[0, 3, -1.0]]}, "rejected_spans", "the span (0, 3) has the weight -1.0"),
        ({"rejected_spans": [[0, 2.5]]}, "rejected_spans", "in whole characters"),
        ({"rejected_score_weight": -1.0}, "rejected_score_weight", "-1.0 is negative"),
        ({"rejected_images": []}, "rejected_images", "it is empty. It must be a list of images"),
        ({"rejected_spans": [3]}, "rejected_spans", "it is not a list of (start, end) or (start, end, weight)"),
        ({"facts": "It is a cup."}, "facts", "it is a str. It must be a list of strings"),
        ({"facts": ["It is a cup.", ""]}, "facts", "'' is not a fact"),
        ({"answer": 3}, "answer", "3 is not a gold answer"),
        ({"margin": math.nan}, "margin", "nan is not a finite number"),
        ({"length_weight": math.inf}, "length_weight", "inf is not a finite number"),
        ({"length_weight": "long"}, "length_weight", "'long' is not a number"),
        ({"images": picture()}, "images", "'images' is a bytes. It must be a list"),
        ({"image": picture()}, "images", "both 'images' and 'image' are filled"),
        ({"images": [picture(), cut_short()]}, "images", "image 1: its bytes cannot be decoded"),
        ({"images": [b""]}, "images", "image 0: the image has zero bytes"),
        ({"images": ["gone.png"]}, "images", "image 0: there is no image file 'gone.png'"),
        ({"images": [None]}, "images", "image 0: an image came as NoneType"),
        ({"prompt": [{"role": "system", "content": "Be kind."}]}, "prompt", "it ends on the system's turn"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]},
            "images",
            "the row has 1 image(s), and its prompt has places for 0",
        ),
    ],
)
def test_each_fault_is_found_and_named(changes, column, fault):
    found = faults(pair(**changes))
    assert column in dict(found)
    assert any(fault in reason for where, reason in found if where == column), found


def test_one_row_can_have_several_faults_and_all_are_counted():
    rows = [pair(), pair(chosen=[assistant("")], facts=[""]), pair(chosen=[assistant(" ")]), pair(images=["gone.png"])]
    report = check_dataset(rows, "dpo", max_problems=2)
    assert (report.rows, report.bad_rows, report.images, report.is_good) == (4, 3, 4, False)
    assert [(problem.row, problem.column) for problem in report.problems] == [(1, "chosen"), (1, "facts")]
    assert report.counts == {
        "chosen: the reply is empty": 2,
        "facts: not a fact": 1,
        "images: no image file": 1,
    }


def test_the_purpose_decides_which_columns_are_needed():
    prompt_only = {"prompt": [user("What?")]}
    assert row_faults(prompt_only, "ppo") == []
    assert [problem.column for problem in row_faults(prompt_only, "dpo")] == ["chosen", "rejected"]
    assert [problem.column for problem in row_faults(prompt_only, "reward")] == ["chosen", "rejected"]
    assert [problem.column for problem in row_faults(prompt_only, "sft")] == ["completion"]
    assert row_faults({**prompt_only, "completion": [assistant("A cup.")]}, "sft") == []
    with pytest.raises(ValueError, match="must be one of dpo, reward, ppo, sft"):
        check_dataset([prompt_only], "rlhf")


def test_images_can_be_left_closed_or_looked_for_in_a_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    row = pair(images=["a.png"])
    assert not check_dataset([row], "dpo").is_good
    assert check_dataset([row], "dpo", load_images=False).is_good
    assert check_dataset([row], "dpo", images=tmp_path).is_good
    assert check_dataset([pair(images=[{"bytes": None, "path": "a.png"}])], "dpo", images=tmp_path).is_good


def test_a_data_set_without_rows_is_not_good():
    assert not check_dataset([], "ppo").is_good


def test_what_trainers_take_is_a_warning_and_leaves_the_row_good():
    same, going_on = pair(rejected=[assistant("A cup.")]), pair(prompt=[user("What?"), assistant("It is")])
    report = check_dataset([same, going_on, pair(prompt=[user("")])], "dpo")
    assert report.is_good and report.bad_rows == 0
    assert [problem.is_warning for problem in report.problems] == [True] * 3
    assert report.counts == {
        "rejected: the replies are the same": 1,
        "prompt: the wrong speaker is last": 1,
        "prompt: the last question is empty": 1,
    }


def test_a_fault_in_a_column_that_the_purpose_does_not_read_is_a_warning():
    row = pair(facts="It is a cup.", margin="0.5", chosen_spans=[[0, 99]], rejected_extra="x")
    bad = {
        purpose: {p.column for p in check_dataset([row], purpose).problems if not p.is_warning} for purpose in PURPOSES
    }
    assert bad["dpo"] == {"chosen_spans", "rejected_extra"}
    assert bad["reward"] == {"facts", "margin"}
    assert bad["ppo"] == {"facts"}
    assert bad["sft"] == {"completion"}


def test_a_broken_rejected_image_is_found_without_a_run():
    found = row_faults(pair(rejected_images=[b"no image"]), "dpo")
    assert [fault.column for fault in found] == ["rejected_images"] and "image 0" in found[0].reason


def test_every_row_needs_as_many_further_replies_as_the_first():
    other = [[assistant("A fork.")], [assistant("A knife.")]]
    report = check_dataset([pair(), pair(rejected_extra=other), pair(rejected_extra=None)], "dpo")
    assert [(p.row, p.reason) for p in report.problems] == [
        (1, "it holds 2 replies, and the first row's 1. Every row needs as many."),
        (2, "it holds 0 replies, and the first row's 1. Every row needs as many."),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": [user("What?"), assistant("A cup.")], "rejected": [user("What?"), assistant("A fork.")]},
    ],
    ids=["strings", "strings without a prompt", "messages without a prompt"],
)
@pytest.mark.parametrize("purpose", ["dpo", "reward"])
def test_text_rows_have_the_forms_that_trl_takes(row, purpose):
    assert row_faults(row, purpose) == []


def test_the_first_fault_is_an_error_with_a_kind_and_the_name_of_the_row():
    with pytest.raises(RowError, match="train row 3, column 'chosen': the reply is empty") as caught:
        check_row(pair(chosen=[assistant("")]), "dpo", name="train row 3")
    assert caught.value.kind == "the reply is empty"
    with pytest.raises(TypeError, match="train row 3, column 'margin': '0.5' is not a number"):
        check_row(pair(margin="0.5"), "reward", name="train row 3")
    check_row(pair(rejected=[assistant("A cup.")], answer=3), "dpo", name="train row 3")  # warnings are no errors
