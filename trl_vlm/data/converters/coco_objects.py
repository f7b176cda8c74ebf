"""The objects and captions of COCO's images: ground truth for CHAIR, Object HalBench and POPE, and facts.

A folder of annotations holds `instances_<split>.json` and, for the captions, `captions_<split>.json`, as in
annotations_trainval2014.zip of cocodataset.org (CC-BY-4.0). One record is made of each image.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import List, Value

from trl_vlm.data.converters.records import (
    PROMPT_COLUMNS,
    BadRecord,
    Record,
    Row,
    list_of_texts,
    need,
    prompt_row,
    read_json,
    user_turn,
)

COLUMNS = {
    **PROMPT_COLUMNS,
    "objects": List(Value("string")),
    "facts": List(Value("string")),
    "image_id": Value("int64"),
}
REQUEST = "Please describe this image in detail."


def records(folder: Path) -> Iterator[Record]:
    """The images of all splits in a folder of annotations, with the classes of their instances and their captions.

    Raises:
        ValueError: There are no annotations, or they have another form.
    """
    files = sorted(folder.glob("instances_*.json")) if folder.is_dir() else []
    if not files:
        raise ValueError(
            f"There is no instances_*.json in {str(folder)!r}. Unpack annotations_trainval2014.zip of "
            "cocodataset.org, and name its folder of annotations."
        )
    for file in files:
        captions = file.with_name(file.name.replace("instances_", "captions_"))
        try:
            yield from _images(read_annotations(file, ("images", "annotations", "categories")), captions_of(captions))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(file)!r} or {captions.name!r} has an entry without {error}; both must be annotation files as "
                "COCO publishes them."
            ) from error


def _images(instances: dict[str, Any], captions: dict[int, list[str]]) -> list[Record]:
    names = {category["id"]: category["name"] for category in instances["categories"]}
    objects: dict[int, set[str]] = defaultdict(set)
    for annotation in instances["annotations"]:
        objects[annotation["image_id"]].add(names[annotation["category_id"]])
    return [
        {
            "image_id": image["id"],
            "file_name": image["file_name"],
            "objects": sorted(objects[image["id"]]),
            "captions": captions[image["id"]],
        }
        for image in sorted(instances["images"], key=lambda image: image["id"])
    ]


def to_row(record: Record) -> Row:
    """A row with the request to describe the image, the classes that it shows, and its captions as facts."""
    need(record, ("image_id", "file_name", "objects", "captions"))
    if not isinstance(record["image_id"], int) or not all(isinstance(name, str) for name in record["objects"]):
        raise BadRecord("an id or a class of another kind", f"{record['image_id']!r}, {record['objects']!r}"[:100])
    facts = list_of_texts([caption for caption in record["captions"] if caption != ""], "caption")
    columns = {"objects": record["objects"], "facts": facts, "image_id": record["image_id"]}
    if not facts and not record["objects"]:
        raise BadRecord("neither objects nor captions", f"image {record['image_id']}")
    return prompt_row(record["file_name"], user_turn(REQUEST), **columns)


def captions_of(file: Path) -> dict[int, list[str]]:
    """The captions of each image; none if there is no such file."""
    found: dict[int, list[str]] = defaultdict(list)
    if file.is_file():
        for annotation in read_annotations(file, ("annotations",))["annotations"]:
            found[annotation["image_id"]].append(annotation["caption"])
    return found


def read_annotations(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """A file of annotations; raises `ValueError` unless it is JSON and has lists under all `keys`."""
    data = read_json(file)
    missing = [key for key in keys if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if missing:
        raise ValueError(
            f"{str(file)!r} has no lists {missing}; it must be an annotation file as COCO publishes them."
        )
    return data
