"""HA-DPO (`juliozhao/hadpo-data`, arXiv:2311.16839, images of Visual Genome) -> preference rows.

A folder such as `hadpo/llava-v1.5` holds `desc_data.json`, descriptions, and `pope_data.json`, questions about
objects. Each model's first replies are rejected, their corrections by GPT-4 chosen, both re-worded several times. One
entry of each file, their content invented; the first file may also be a list whose entries name their `image_id`:

    {"2370000": {"chosen": ["A cup on a table.", "On a table is a cup."], "rejected": ["A cup and a fork."]}}

    {"image_id": 2370001, "question": "Is there a dog?", "chosen": "No, there is none.", "reject": "Yes, a dog runs.",
     "answer": "no", "correct": false}

Source: the fields that the published training code reads (`train_dpo.py` and `dpo_dataset.py` of opendatalab/HA-DPO).
"""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Value

from trl_vlm.data.converters.records import (
    PREFERENCE_COLUMNS,
    BadRecord,
    Converted,
    Record,
    clean_text,
    drawn_one,
    list_of_texts,
    need,
    preference_row,
    question_text,
    read_json,
    user_turn,
)

COLUMNS = {**PREFERENCE_COLUMNS, "kind": Value("string"), "id": Value("string")}

REPLIES = ("one", "all")
REQUESTS = (
    "Please describe this image in detail.",
    "What does this picture show? Give a detailed description.",
    "Tell me everything that can be seen here.",
    "Write a thorough description of the image.",
)


def records(folder: Path) -> Iterator[Record]:
    """The entries of both files, each with the name of its image.

    With Visual Genome's own `image_data.json` in the folder, names lead into its two parts (`VG_100K_2/1.jpg`);
    without, they are `<id>.jpg`.

    Raises:
        ValueError: None of the files is there, or one has another form.
    """
    files = [folder / "desc_data.json", folder / "pope_data.json"]
    if not any(file.is_file() for file in files):
        raise ValueError(
            f"There is neither desc_data.json nor pope_data.json in {str(folder)!r}. Download juliozhao/hadpo-data, "
            "and name the folder of one model in it."
        )
    names = _names(folder / "image_data.json")
    for file in files:
        for entry in _entries(file) if file.is_file() else ():
            name = names.get(str(entry.get("image_id")), f"{entry.get('image_id')}.jpg")
            yield {"kind": file.name.partition("_")[0], "image": name, **entry}


def _entries(file: Path) -> list[dict[str, Any]]:
    data = read_json(file)
    if isinstance(data, dict) and all(isinstance(entry, dict) for entry in data.values()):
        return [{"image_id": name, **entry} for name, entry in data.items()]
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise ValueError(f"{str(file)!r} must hold a list of entries, or one entry for each image.")
    return data


def _names(file: Path) -> dict[str, str]:
    """Image id -> its part of Visual Genome and file name, the last two parts of its published address."""
    if not file.is_file():
        return {}
    try:
        return {str(image["image_id"]): "/".join(image["url"].split("/")[-2:]) for image in read_json(file)}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is not Visual Genome's list of images (without {error}).") from error


def to_rows(record: Record, *, replies: str = "one") -> Converted:
    """The preference rows of one entry; a question that the model answered rightly makes none, and is counted.

    Args:
        record: One entry, with `kind` ("desc" or "pope") and `image`.
        replies: "one": of a description's wordings one chosen and one rejected, drawn by the image, as published.
            "all": every chosen one with every rejected one.
    """
    if replies not in REPLIES:
        raise ValueError(f"`replies` is {replies!r}; it must be one of {', '.join(REPLIES)}.")
    need(record, ["image", "image_id", "kind"])
    name = str(record["image_id"])
    if record["kind"] == "pope":
        need(record, ["question", "chosen", "reject"])
        if record.get("correct"):
            return Converted([], Counter({"the model's answer is correct": 1}))
        prompt = user_turn(question_text(record["question"]))
        pairs = [(record["chosen"], record["reject"])]
    else:
        need(record, ["chosen", "rejected"])
        prompt = user_turn(drawn_one(REQUESTS, name))
        sides = [_wordings(record[side], f"{side} wording") for side in ("chosen", "rejected")]
        pairs = [tuple(drawn_one(side, name) for side in sides)] if replies == "one" else list(product(*sides))
    return Converted(
        [preference_row(record["image"], prompt, *pair, kind=str(record["kind"]), id=name) for pair in pairs]
    )


def _wordings(value: object, what: str) -> list[str]:
    texts = [clean_text(value, what)] if isinstance(value, str) else list_of_texts(value, what)
    if not texts:
        raise BadRecord(f"no {what}")
    return texts
