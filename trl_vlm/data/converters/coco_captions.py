"""COCO's captions (cocodataset.org, CC-BY-4.0) -> prompt rows with the captions of the image as facts.

A folder of annotations holds `captions_<split>.json`, as in annotations_trainval2017.zip. One record is made of each
image. The same files serve any dataset about COCO's images as `--facts`.
"""

from collections.abc import Iterator
from pathlib import Path

from datasets import List, Value

from trl_vlm.data.converters.coco_objects import REQUEST, captions_of, read_annotations
from trl_vlm.data.converters.records import (
    PROMPT_COLUMNS,
    BadRecord,
    Record,
    Row,
    list_of_texts,
    need,
    prompt_row,
    user_turn,
)

COLUMNS = {**PROMPT_COLUMNS, "facts": List(Value("string")), "image_id": Value("int64")}


def records(folder: Path) -> Iterator[Record]:
    """The images of all splits in a folder of annotations, with their captions.

    Raises:
        ValueError: There are no captions, or they have another form.
    """
    files = sorted(folder.glob("captions_*.json")) if folder.is_dir() else []
    if not files:
        raise ValueError(
            f"There is no captions_*.json in {str(folder)!r}. Unpack the annotations of cocodataset.org, and name "
            "their folder."
        )
    for file in files:
        try:
            captions = captions_of(file)
            images = sorted(read_annotations(file, ("images",))["images"], key=lambda image: image["id"])
            for image in images:
                yield {
                    "image_id": image["id"],
                    "file_name": image["file_name"],
                    "captions": captions.get(image["id"], []),
                }
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(file)!r} has an entry without {error}; COCO publishes it otherwise.") from error


def to_row(record: Record) -> Row:
    """A row with the request to describe the image, and its captions as facts."""
    need(record, ("image_id", "file_name", "captions"))
    if isinstance(record["image_id"], bool) or not isinstance(record["image_id"], int):
        raise BadRecord("image_id is not a number", f"got {str(record['image_id'])[:60]!r}")
    facts = list_of_texts(record["captions"], "caption")
    if not facts:
        raise BadRecord("no captions", f"image {record['image_id']}")
    return prompt_row(record["file_name"], user_turn(REQUEST), facts=facts, image_id=record["image_id"])
