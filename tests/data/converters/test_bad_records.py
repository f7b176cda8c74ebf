"""One table of odd records for every converter: each is named, or left out and counted, and nothing else is lost."""

import json
import math
import socket

import pyarrow
import pyarrow.parquet as parquet
import pytest

from tests.data.converters.helpers import (
    FACTS,
    NLF_COLUMNS,
    a_okvqa,
    annotated,
    fact_rlhf,
    gpt,
    hsa_dpo,
    human,
    image_folder,
    llava_conversations,
    llava_preference,
    mdpo,
    mmpr,
    nlf,
    png,
    povid,
    rlaif_v,
    rlhf_v,
    vlfeedback,
)
from trl_vlm.data.converters import CONVERTERS, BadRecord, Source, convert

SCORES = (-1, "2", True, [1], math.nan, math.inf)
HALF = "half a character \ud83d"
RATINGS = [("5", "5", "5"), ("1", "1", "1")]
QUESTION = [human("<image>\nWhat is it?"), gpt("A cat.")]


def text_of(**changes):
    return {"text": json.dumps({"question": "What?", "chosen": "A cat.", "rejected": "A dog.", **changes})}


def completions_of(**changes):
    return {"completions": {**vlfeedback(RATINGS)["completions"], **changes}}


# What is no image of a folder of images, whatever the dataset.
IMAGES = {
    "no image": None,
    "an empty name": "",
    "a number": 3.5,
    "a list": ["good.png"],
    "nothing in a dictionary": {"bytes": None, "path": None},
    "an empty dictionary": {},
    "a dictionary with a number": {"bytes": None, "path": 3},
    "bytes that are a number": {"bytes": 3, "path": "good.png"},
    "an address": "http://127.0.0.1:9/a.png",
    "another address": "ftp://127.0.0.1/a.png",
    "an address in a dictionary": {"bytes": None, "path": "https://127.0.0.1:9/a.png"},
    "a data address": "data:image/png;base64,iVBORw0KGgo=",
    "a file above the folder": "../outside.png",
    "a file above the folder in a dictionary": {"bytes": None, "path": "../outside.png"},
    "a link that leads out": "link.png",
    "a folder": ".",
    "a name with a zero byte": "good\0.png",
    "a name of 5000 characters": "x" * 5000 + ".png",
    "half a character in a name": "good\ud83d.png",
    "no such file": "gone.png",
    "a page of the web": "page.png",
    "an empty file": "empty.png",
}
TEXTS = {
    "None": None,
    "a number": 3,
    "not a number": math.nan,
    "a list": ["A cat."],
    "a dictionary": {"text": "A cat."},
    "true": True,
    "empty": "",
    "white space": " \n\t",
    "half a character": HALF,
    "another image token": "A cat. <|image_pad|>",
}
CONVERSATIONS = {
    "None": None,
    "a string": "What?",
    "empty": [],
    "numbers": [3],
    "None in it": [None],
    "no speaker": [{"value": "What?"}],
    "a list as a speaker": [{"from": ["human"], "value": "What?"}],
    "an unknown speaker": [{"from": "narrator", "value": "What?"}],
    "no text": [{"from": "human"}, gpt("A cat.")],
    "a number as text": [human(3), gpt("A cat.")],
    "half a character": [human(HALF), gpt("A cat.")],
    "the same speaker twice": [human("What?"), human("Well?"), gpt("A cat.")],
    "two images": [human("<image> <image> What?"), gpt("A cat.")],
    "an image in a later turn": [*QUESTION, human("<image> And?"), gpt("A dog.")],
}

# converter -> (a good record, the column of its image, its columns of text, its columns of turns, what is its own)
TABLE = {
    "rlhf-v": (
        rlhf_v(image="good.png"),
        "image",
        (),
        (),
        {
            "text is None": {"text": None},
            "text is a number": {"text": 3},
            "text is no JSON": {"text": "question: What?"},
            "text is half of JSON": {"text": text_of()["text"][:-5]},
            "text is a list": {"text": "[]"},
            "text is null": {"text": "null"},
            "text is very deep": {"text": "[" * 100_000},
            "a number of 5000 digits": {"text": '{"question": ' + "1" * 5000 + "}"},
            "no question": {"text": json.dumps({"chosen": "A cat.", "rejected": "A dog."})},
            **{f"chosen is {name}": text_of(chosen=value) for name, value in TEXTS.items()},
            **{f"question is {name}": text_of(question=value) for name, value in TEXTS.items()},
            "image token in a reply": text_of(chosen="<image> A cat."),
            "equal replies": text_of(rejected="A cat. "),
            "half a character in idx": {"idx": HALF},
        },
    ),
    "rlaif-v": (rlaif_v(image="good.png"), "image", ("question", "chosen", "rejected"), (), {}),
    "vlfeedback": (
        vlfeedback(RATINGS, img_path="good.png"),
        "img_path",
        ("prompt",),
        (),
        {
            "completions is None": {"completions": None},
            "completions is a number": {"completions": 3},
            "completions is a string": {"completions": "A cat."},
            "completions are numbers": {"completions": [3, 4]},
            "completions are None": {"completions": [None]},
            "completions are empty": {"completions": [{}]},
            "a column is missing": {"completions": {"response": ["A cat."]}},
            "a column is None": completions_of(response=None),
            "a column is a number": completions_of(model=3),
            "a column is a string": completions_of(response="AB"),
            "columns differ in length": completions_of(response=["A cat."]),
            "half a character in a reply": completions_of(response=[HALF, "A dog."]),
            "image token in a reply": completions_of(response=["<image> A cat.", "A dog."]),
        },
    ),
    "povid": (
        povid(image="good.png"),
        "image",
        (),
        ("conversations", "rejected_conversations"),
        {"other questions": {"rejected_conversations": [human("Which?"), gpt("A fork.")]}},
    ),
    "llava-human-preference": (
        llava_preference(image="good.png"),
        "image",
        (),
        ("conversations",),
        {
            **{f"preference is {value!r}": {"preference": value} for value in (None, 0, 3, "first", [1], True, 1.5)},
            **{f"output is {name}": {"output_1": {"from": "gpt", "value": value}} for name, value in TEXTS.items()},
            "output is empty": {"output_1": {}},
            "output is a list": {"output_2": ["A cat."]},
            "no facts of its image": {"image": "unknown.png"},
            "facts that are a string": {"image": "string.png"},
            "facts that are None": {"image": "none.png"},
            "facts of numbers": {"image": "numbers.png"},
            "facts with half a character": {"image": "half.png"},
        },
    ),
    "nlf": (
        nlf(pic="good.png"),
        "pic",
        ("ask", "after", "first"),
        (),
        {
            "an image that is true": {"pic": True},
            "a number of 5000 digits": {"pic": "1" * 5000},
            "a number below zero": {"pic": -1},
            "turns that end on the reply": {"ask": QUESTION},
        },
    ),
    "fact-rlhf": (
        fact_rlhf(image="good.png"),
        "image",
        (),
        ("conversations",),
        {
            **{f"caption type {value!r}": {"caption_type": value} for value in ("x", 9, -1, 2.5, True, math.nan, [2])},
            "a caption type of 5000 digits": {"caption_type": "1" * 5000},
            **{f"length bonus {value!r}": {"length_bonus": value} for value in ("1", math.nan, math.inf, True, [])},
            "a length bonus of 400 digits": {"length_bonus": 10**400},
            **{
                f"captions are {value!r}": {"captions": value}
                for value in ("A bus.", 3, [3], [None], {"a": "b"}, [" "])
            },
            "half a character in a caption": {"captions": [HALF]},
        },
    ),
    "vl-rewardbench": (
        {
            "id": "RLAIF-V-14",
            "query": "What is on the table?",
            "response": ["A red cup.", "Two dogs."],
            "human_ranking": [0, 1],
            "image": "good.png",
        },
        "image",
        ("query",),
        (),
        {
            **{f"response {value!r}": {"response": value} for value in (None, 3, "AB", [], ["A cat."], [3, "A cat."])},
            **{f"ranking {value!r}": {"human_ranking": value} for value in (None, 3, "01", [0], [0, 0], [None, 0])},
            "a ranking of lists": {"human_ranking": [[], 0]},
            "half a character in a reply": {"response": [HALF, "Two dogs."]},
            "half a character in the id": {"id": HALF},
            "equal replies": {"response": ["A cat.", "A cat. "]},
        },
    ),
    "multimodal-rewardbench": (
        {
            "ID": "mathvista-12",
            "Text": "How many bars are there?",
            "Output1": "Four.",
            "Output2": "Five.",
            "Better": "Output1",
            "Category": "reasoning",
            "Image": "good.png",
        },
        "Image",
        ("Text", "Output1", "Output2"),
        (),
        {
            **{f"better {value!r}": {"Better": value} for value in (None, 1, "Output3", ["Output1"], {}, "")},
            **{f"category {value!r}": {"Category": value} for value in (None, 3, "", [], HALF)},
            "half a character in the id": {"ID": HALF},
        },
    ),
    "annotations": (
        annotated(image="good.png"),
        "image",
        ("reply",),
        ("prompt",),
        {
            **{f"rewrite is {name}": {"rewrite": value} for name, value in TEXTS.items() if value is not None},
            "spans are a number": {"spans": 3},
            "spans are a string": {"spans": "Three"},
            "spans are a dictionary": {"spans": {"start": 0, "end": 5}},
            "a span of None": {"spans": [None]},
            "a span without end": {"spans": [{"start": 0}]},
            "a span that ends at true": {"spans": [{"start": 0, "end": True}]},
            "a span outside": {"spans": [{"start": 0, "end": 99}]},
            "a span backwards": {"spans": [{"start": 5, "end": 0}]},
            "a span of other words": {"spans": [{"start": 0, "end": 5, "text": "Seven"}]},
            "half a character in a kind": {"spans": [{"start": 0, "end": 5, "kind": HALF}]},
        },
    ),
    "llava-conversations": (
        llava_conversations(image="good.png"),
        "image",
        (),
        ("conversations",),
        {
            "a list of two images and one place": {"image": ["good.png", "good.png"]},
            "two images within the question": {
                "image": ["good.png", "good.png"],
                "conversations": [human("Is <image> as <image>?"), gpt("No.")],
            },
            "an image in a reply": {"conversations": [human("What?"), gpt("<image> A cat.")]},
            "a place and no image": {"image": None},
            "a question at the end": {"conversations": [*QUESTION, human("And?")]},
            "a reply at the beginning": {"conversations": [gpt("A cat."), human("Where?"), gpt("There.")]},
            "an image alone": {"conversations": [human("<image>"), gpt("A cat.")]},
            "a list of a number": {"image": [3]},
            "half a character in the id": {"id": HALF},
        },
    ),
    "mmpr": (
        mmpr(image="good.png"),
        "image",
        ("question", "chosen", "rejected"),
        (),
        {
            "two images and one place": {"image": ["good.png", "good.png"]},
            "equal replies": {"chosen": "A cat.", "rejected": "A cat. "},
            "an image in a reply": {"chosen": "<image> A cat."},
        },
    ),
    "hsa-dpo": (
        hsa_dpo(image="good.png"),
        "image",
        ("question", "chosen", "rejected"),
        (),
        {
            **{
                f"{side} score {value!r}": {f"{side}_score": value}
                for side in ("chosen", "rejected")
                for value in SCORES
            },
            **{f"id {value!r}": {"id": value, "image": None} for value in (None, "", [1], True, 1.5, "gone")},
        },
    ),
    "mdpo": (
        mdpo(img_path="good.png"),
        "img_path",
        ("prompt", "chosen", "rejected"),
        (),
        {
            "two questions": {"prompt": "USER: What? ASSISTANT: A cat. USER: Where? ASSISTANT:"},
            "an open end": {"prompt": "USER: What?"},
            "a begun reply": {"prompt": "USER: What? ASSISTANT: It is"},
            "no question": {"prompt": "A chat. USER: <image> ASSISTANT:"},
        },
    ),
    "a-okvqa": (
        a_okvqa(image="good.png"),
        "image",
        ("question",),
        (),
        {
            **{f"choices {value!r}": {"choices": value} for value in (None, "ab", [], ["a"], ["a", 3], ["a", " "])},
            "more choices than letters": {"choices": ["a"] * 9},
            **{f"right choice {value!r}": {"correct_choice_idx": value} for value in (None, 4, -1, "1", True, 1.0)},
            **{f"rationales {value!r}": {"rationales": value} for value in (None, "A tram.", [3], [""], [HALF])},
            "an image id in words": {"image": None, "image_id": [42]},
            "an image token in a choice": {"choices": ["<image>", "<image>"]},
        },
    ),
}
OPTIONS = {"nlf": NLF_COLUMNS, "llava-conversations": {"turns": "last"}}
# What these take for a record without image or with several, and is tried with the places in their texts.
PASSES = {
    "llava-conversations": ("image is missing", "image: a list"),
    "mmpr": ("image: a list",),
    "hsa-dpo": ("image: no image", "image is missing"),
    "a-okvqa": ("image: no image", "image is missing"),
}
OWN_READERS = {"coco-objects", "coco-captions", "hadpo", "vqav2", "flickr30k-entities"}
WITH_FACTS = ("llava-human-preference",)


def bad_records(name):
    """What is wrong -> the changes, or the key that is missing."""
    return [(what, change) for what, change in _changes(name) if what not in PASSES.get(name, ())]


def _changes(name):
    good, image, texts, conversations, own = TABLE[name]
    yield from ((f"{column} is missing", column) for column in (image, *texts, *conversations))
    yield from ((f"image: {what}", {image: value}) for what, value in IMAGES.items())
    for column in texts:
        yield from ((f"{column}: {what}", {column: value}) for what, value in TEXTS.items())
    for column in conversations:
        yield from ((f"{column}: {what}", {column: value}) for what, value in CONVERSATIONS.items())
    yield from own.items()


CASES = [(name, what, change) for name in TABLE for what, change in bad_records(name)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"a connection was tried: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    names = ["good.png", "string.png", "none.png", "numbers.png", "half.png", "unknown.png"]
    images = image_folder(folder / "images", *names, "000000000001.jpg")
    image_folder(folder, "outside.png")
    (images / "link.png").symlink_to(folder / "outside.png")
    (images / "page.png").write_bytes(b"<html>404</html>")
    (images / "empty.png").write_bytes(b"")
    odd = {"string.png": "A cat.", "none.png": None, "numbers.png": [3], "half.png": [HALF]}
    (folder / "facts.json").write_text(json.dumps({**FACTS, "good.png": ["A cat."], **odd}))
    return folder


def changed(good, change):
    if isinstance(change, str):
        return {column: value for column, value in good.items() if column != change}
    return {**good, **change}


def convert_all(name, records, world, folder, **options):
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if name in WITH_FACTS:
        options["facts"] = world / "facts.json"
    source = Source(str(folder / "in.jsonl"))
    images = world / "images"
    return convert(
        name, source, folder / "out.jsonl", images=images, progress=False, **options, **OPTIONS.get(name, {})
    )


def test_the_table_holds_every_converter_and_is_long():
    assert {*TABLE, *OWN_READERS} == set(CONVERTERS)  # the records of these are made by their own readers
    assert len(CASES) > 200


@pytest.mark.parametrize(("name", "what", "change"), CASES, ids=[f"{name} {what}"[:60] for name, what, _ in CASES])
def test_a_bad_record_is_named_in_the_error(name, what, change, world, tmp_path):
    good = TABLE[name][0]
    with pytest.raises(BadRecord, match=r"in\.jsonl, record 1: .*`skip_bad` leaves such records out"):
        convert_all(name, [good, changed(good, change), good], world, tmp_path)


@pytest.mark.parametrize("name", TABLE)
def test_bad_records_are_counted_and_no_other_is_lost(name, world, tmp_path):
    good, bad = TABLE[name][0], [changed(TABLE[name][0], change) for _, change in bad_records(name)]
    records = [each for record in bad for each in (record, {**good, "id": "1"})]
    report = convert_all(name, [good, *records], world, tmp_path, skip_bad=True)
    assert (report.records, report.rows) == (2 * len(bad) + 1, len(bad) + 1)
    assert sum(report.dropped.values()) == len(bad)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {tuple(row["images"]) for row in rows} == {(str((world / "images" / "good.png").resolve()),)}


@pytest.mark.parametrize("image", [b"", b"<html>", png()[:20], {"bytes": b"GIF89a", "path": "good.png"}])
def test_bytes_that_are_no_image_are_named_or_counted(image, world, tmp_path):
    image = image if isinstance(image, dict) else {"bytes": image, "path": None}
    good = {"bytes": png(), "path": "7.png"}
    records = [rlaif_v(image=each) for each in (good, image, good)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in.parquet")
    source = Source(str(tmp_path / "in.parquet"))
    with pytest.raises(BadRecord, match=r"record 1: (missing image|not an image)"):
        convert("rlaif-v", source, tmp_path / "out", progress=False)
    report = convert("rlaif-v", source, tmp_path / "out", skip_bad=True, progress=False)
    assert (report.records, report.rows, sum(report.dropped.values())) == (3, 2, 1)
