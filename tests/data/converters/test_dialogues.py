"""LLaVA's conversations: any number of images and turns, and the three ways to make supervised rows of them."""

import pytest

from tests.data.converters.helpers import gpt, human, image_folder, llava_conversations, mmpr
from tests.data.converters.test_conversion import loaded, write_json
from trl_vlm.data.checks import check_dataset
from trl_vlm.data.converters import CONVERTERS, BadRecord, Source, convert
from trl_vlm.data.converters.dialogues import dialogue

to_rows = CONVERTERS["llava-conversations"]
TEXT = [
    ("user", "What stands there?"),
    ("assistant", "A red bus."),
    ("user", "Is anyone in it?"),
    ("assistant", "No."),
]
MESSAGES = [{"role": role, "content": content} for role, content in TEXT]
IMAGE = {"type": "image", "text": None}


def text(value):
    return {"type": "text", "text": value}


def test_each_reply_becomes_a_row_after_its_history():
    rows = to_rows(llava_conversations()).rows
    assert rows == [
        {"images": ["000000333333.jpg"], "id": "000000333333", "prompt": MESSAGES[:1], "completion": MESSAGES[1:2]},
        {"images": ["000000333333.jpg"], "id": "000000333333", "prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
    ]


def test_the_last_reply_or_all_in_one_row():
    record = llava_conversations()
    assert to_rows(record, turns="last").rows == to_rows(record).rows[1:]
    whole = {"images": ["000000333333.jpg"], "id": "000000333333", "messages": MESSAGES}
    assert to_rows(record, turns="all").rows == [whole]


@pytest.mark.parametrize("turns", ["each", "last", "all"])
def test_only_so_many_replies_are_kept(turns):
    record = llava_conversations()
    first = to_rows({**record, "conversations": record["conversations"][:2]}, turns=turns).rows
    assert to_rows(record, turns=turns, max_turns=1).rows == first
    assert to_rows(record, turns=turns, max_turns=9) == to_rows(record, turns=turns)


def test_a_conversation_without_image_is_a_row_without_image():
    turns = [human("Who wrote Faust?"), gpt("Goethe.")]
    for record in (
        {"conversations": turns},
        {"conversations": turns, "image": None},
        llava_conversations(turns, image=""),
    ):
        assert [row["images"] for row in to_rows(record).rows] == [[]]


def test_a_system_turn_stays_before_the_question():
    turns = [{"from": "system", "value": "Be brief."}, human("What is it?\n<image>"), gpt("A bus.")]
    prompt = to_rows(llava_conversations(turns)).rows[0]["prompt"]
    assert [(message["role"], message["content"]) for message in prompt] == [
        ("system", "Be brief."),
        ("user", "What is it?"),
    ]


def test_several_images_at_the_start_need_no_parts():
    turns = [human("<image>\n<image> Which is older?"), gpt("The first.")]
    rows = to_rows(llava_conversations(turns, image=["a.jpg", "b.jpg"])).rows
    assert rows[0]["images"] == ["a.jpg", "b.jpg"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Which is older?"}]
    unmentioned = [human("Which is older?"), gpt("The first.")]
    assert to_rows(llava_conversations(unmentioned, image=["a.jpg", "b.jpg"])).rows == rows


def test_parts_keep_each_image_where_it_is_mentioned():
    turns = [human("Is <image> older than\n<image>?"), gpt("No."), human("<image> And this?"), gpt("Yes.")]
    assert dialogue(turns, 3, "parts") == [
        {"role": "user", "content": [text("Is"), IMAGE, text("older than"), IMAGE, text("?")]},
        {"role": "assistant", "content": [text("No.")]},
        {"role": "user", "content": [IMAGE, text("And this?")]},
        {"role": "assistant", "content": [text("Yes.")]},
    ]
    assert dialogue(turns[1:], 1, "parts")[0] == {"role": "assistant", "content": [text("No.")]}
    assert dialogue([human("Well?"), gpt("No.")], 2, "parts")[0]["content"] == [IMAGE, IMAGE, text("Well?")]


@pytest.mark.parametrize(
    ("turns", "images", "places", "fault"),
    [
        ([human("<image> A?"), gpt("B.")], 0, "start", "placeholders and images differ: 1 x <image>, and 0 images"),
        ([human("<image> A?"), gpt("B.")], 2, "parts", "placeholders and images differ"),
        ([human("<image> A <image>?"), gpt("B.")], 2, "start", "images are not at the start.*image_places"),
        ([human("A?"), gpt("B."), human("<image> C?"), gpt("D.")], 1, "start", "images are not at the start"),
        ([human("A?"), gpt("<image> B.")], 1, "parts", "turn of conversations mentions <image>"),
        ([gpt("B.")], 0, "start", "conversations holds no question"),
        ([human("<image>"), gpt("B.")], 1, "parts", "empty question"),
    ],
)
def test_images_without_a_place_make_a_bad_record(turns, images, places, fault):
    with pytest.raises(BadRecord, match=fault):
        dialogue(turns, images, places)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="`turns` is 'first'; it must be one of each, last, all"):
        to_rows(llava_conversations(), turns="first")
    with pytest.raises(ValueError, match="`image_places` is 'end'; it must be one of start, parts"):
        to_rows(llava_conversations(), image_places="end")


@pytest.mark.parametrize(
    "options", [{"turns": "all"}, {"image_places": "parts"}, {"turns": "all", "image_places": "parts"}]
)
@pytest.mark.parametrize("output", ["rows.parquet", "rows.jsonl"])
def test_whole_conversations_and_parts_are_written_and_pass_the_check(tmp_path, options, output):
    images = image_folder(tmp_path / "images", "a.jpg", "b.jpg")
    turns = [human("<image> <image> Which is older?"), gpt("The first.")]
    records = [llava_conversations(image="a.jpg"), llava_conversations(turns, image=["a.jpg", "b.jpg"])]
    source = write_json(tmp_path / "in.jsonl", [*records, {"conversations": [human("Who?"), gpt("I.")]}])
    convert("llava-conversations", source, tmp_path / output, images=images, progress=False, **options)
    report = check_dataset(Source(str(tmp_path / output)).records(), "sft")
    assert report.problems == []
    assert report.images == (3 if options.get("turns") else 4)


def test_a_whole_conversation_that_is_odd_is_found_by_the_check():
    row = {"images": [], "messages": [{"role": "user", "content": "A?"}, {"role": "system", "content": "B."}]}
    assert [problem.column for problem in check_dataset([row], "sft").problems] == ["messages"]
    row["messages"] = [{"role": "user", "content": "A? <image>"}, {"role": "assistant", "content": "B."}]
    assert check_dataset([row], "sft").counts == {"messages: an image token in the text": 1}


def test_mmpr_takes_no_image_one_and_several(tmp_path):
    images = image_folder(tmp_path / "images", "bus.png", "a.jpg")
    records = [mmpr(), mmpr(image=["a.jpg", "bus.png"], question="Image-1: <image>\nImage-2: <image>\nWhich?")]
    records.append(mmpr(image="", question="Who?"))
    source = write_json(tmp_path / "in.jsonl", records)
    output = tmp_path / "rows.parquet"
    report = convert("mmpr", source, output, images=images, image_places="parts", progress=False)
    assert report.rows == 3
    assert check_dataset(Source(str(output)).records(), "dpo").problems == []
    content = loaded(output)[1]["prompt"][0]["content"]
    assert content == [text("Image-1:"), IMAGE, text("Image-2:"), IMAGE, text("Which?")]
