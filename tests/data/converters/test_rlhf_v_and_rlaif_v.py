import json

import pytest
from PIL import Image

from tests.data.converters.helpers import png, rlaif_v, rlhf_v
from trl_vlm.data.converters import BadRecord, MissingColumns
from trl_vlm.data.converters import rlaif_v as rlaif_v_module
from trl_vlm.data.converters import rlhf_v as rlhf_v_module


def test_an_rlhf_v_record_becomes_a_preference_row():
    record = rlhf_v(question="<image>\nWhat is in the park?")
    assert rlhf_v_module.to_row(record) == {
        "images": [{"bytes": png(), "path": None}],
        "prompt": [{"role": "user", "content": "What is in the park?"}],
        "chosen": [{"role": "assistant", "content": "Two dogs run."}],
        "rejected": [{"role": "assistant", "content": "Three dogs run."}],
        "idx": "17",
        "origin_split": '{"model": "Muffin", "type": "detailed description"}',
    }


def test_an_rlaif_v_record_becomes_a_preference_row():
    row = rlaif_v_module.to_row(rlaif_v(chosen=" A red cup.\n"))
    assert row["prompt"] == [{"role": "user", "content": "What is on the table?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "A red cup."}]
    assert row["rejected"] == [{"role": "assistant", "content": "A red cup and a fork."}]
    assert (row["idx"], row["ds_name"], row["origin_split"]) == ("7", "RLAIF-V", '{"type": "question answering"}')
    assert set(row) == set(rlaif_v_module.COLUMNS)


@pytest.mark.parametrize(
    "image", [png(), "coco/park.jpg", {"bytes": None, "path": "park.jpg"}, Image.new("RGB", (2, 2))]
)
def test_the_image_may_be_bytes_a_path_or_a_picture(image):
    assert rlhf_v_module.to_row(rlhf_v(image))["images"] == [image]


@pytest.mark.parametrize("image", [{"bytes": None, "path": None}, "", b""])
def test_a_record_without_an_image_is_refused(image):
    with pytest.raises(BadRecord, match="missing image"):
        rlhf_v_module.to_row(rlhf_v(image))


def test_converting_leaves_the_record_alone():
    record = rlhf_v()
    before = json.dumps(record, default=repr)
    rlhf_v_module.to_row(record)
    assert json.dumps(record, default=repr) == before


def test_text_that_has_been_read_already_is_accepted():
    text = {"question": "Q?", "chosen": "A.", "rejected": "B."}
    assert rlhf_v_module.to_row(rlhf_v(text=text))["chosen"][0]["content"] == "A."


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"text": "{question"}, "`text` is not JSON"),
        ({"text": '["Q", "A", "B"]'}, "`text` lacks question, chosen or rejected: it holds list"),
        ({"text": '{"question": "Q", "chosen": "A"}'}, r"it holds \['chosen', 'question'\]"),
        ({"chosen": " "}, "empty chosen reply"),
        ({"rejected": ""}, "empty rejected reply"),
        ({"chosen": "Same.", "rejected": "Same. "}, "chosen and rejected are the same: 'Same.'"),
        ({"chosen": "See <image>."}, "chosen reply mentions <image>"),
        ({"question": "<image>"}, "empty question"),
        ({"question": "<image><image> Q?"}, "more image placeholders than images"),
        ({"chosen": 3}, "chosen reply is not text: got int '3'"),
    ],
)
def test_an_odd_rlhf_v_record_is_refused_with_its_fault(changes, fault):
    with pytest.raises(BadRecord, match=fault):
        rlhf_v_module.to_row(rlhf_v(**changes))


def test_another_schema_is_refused_with_the_columns_found_and_those_needed():
    with pytest.raises(
        MissingColumns, match=r"\['text'\]. Found the columns \['image', 'label'\].*\['image', 'text'\]"
    ):
        rlhf_v_module.to_row({"image": b"", "label": 3})
    with pytest.raises(MissingColumns, match="rlaif-v_formatted` needs no conversion"):
        rlaif_v_module.to_row({"images": [], "prompt": []})
