"""Flickr30k Entities (arXiv:1505.04870, images of Flickr30k, non-commercial) -> captions with a box after each phrase.

Read: the folder of the unpacked `annotations.zip` of BryanPlummer/flickr30k_entities, with `Sentences/<id>.txt`, a
caption on each line, and `Annotations/<id>.xml`, the boxes. One line and the heart of a file, their content invented:

    [/EN#1/people A man] rides [/EN#2/vehicles a bike] past [/EN#3/scene the lake] .

    <annotation><size><width>500</width><height>400</height><depth>3</depth></size>
      <object><name>1</name><bndbox><xmin>50</xmin><ymin>40</ymin><xmax>150</xmax><ymax>300</ymax></bndbox></object>
      <object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>

Source: the files as the dataset's README describes them. Captions with boxes ("spotting captions") are Shikra's
(arXiv:2306.15195): `[x1,y1,x2,y2]` with three decimals after each phrase, several boxes with `;` between them.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import List, Value

from trl_vlm.data.converters.dialogues import SUPERVISED_COLUMNS
from trl_vlm.data.converters.records import (
    BadRecord,
    Converted,
    Record,
    assistant_turn,
    clean_reply,
    drawn_one,
    list_of_texts,
    need,
    prompt_row,
    user_turn,
)

COLUMNS = {
    **{name: SUPERVISED_COLUMNS[name] for name in ("images", "prompt", "completion")},
    "facts": List(Value("string")),
    "id": Value("string"),
}

CAPTIONS = ("one", "all")
FRAMES = ("image", "square")
REQUESTS = (
    "Describe the image in a sentence, and give the box [x1,y1,x2,y2] of everything that you name.",
    "Write a short caption with the place of each object in brackets.",
    "What is in the picture, and where? Answer in a sentence with boxes.",
)
PHRASE = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]*)\]")

Box = Sequence[float]


def records(folder: Path) -> Iterator[Record]:
    """The images of a folder, each with its marked captions, its size, and the boxes of each phrase.

    Raises:
        ValueError: There are no captions, or a file of boxes is missing or has another form.
    """
    files = sorted((folder / "Sentences").glob("*.txt"))
    if not files:
        raise ValueError(
            f"There are no captions in {str(folder / 'Sentences')!r}. Unpack annotations.zip of "
            "BryanPlummer/flickr30k_entities, and name the folder that Sentences and Annotations are in."
        )
    for file in files:
        boxes = folder / "Annotations" / f"{file.stem}.xml"
        try:
            read = _boxes(ElementTree.fromstring(boxes.read_bytes()))
        except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
            raise ValueError(f"The boxes {str(boxes)!r} cannot be read ({error}). Is the folder complete?") from error
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        yield {"id": file.stem, "image": f"{file.stem}.jpg", "captions": [line for line in lines if line], **read}


def _boxes(root: ElementTree.Element) -> dict[str, Any]:
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes: dict[str, list[list[int]]] = defaultdict(list)
    for thing in root.iter("object"):
        for box in thing.iter("bndbox"):
            corners = [int(box.findtext(side, "")) for side in sides]
            for name in thing.iter("name"):
                boxes[str(name.text)].append(corners)
    size = [int(root.findtext(f"size/{side}", "")) for side in ("width", "height")]
    return {"size": size, "boxes": dict(boxes)}


def to_rows(record: Record, *, captions: str = "one", frame: str = "image") -> Converted:
    """The supervised rows of one image; its plain captions are the `facts`.

    Args:
        record: One image with its captions and boxes.
        captions: "one" of them, drawn by the image; or "all", a row of each.
        frame: What a box is measured in: the "image" (0 to 1 along each side), or the "square" that it is padded to,
            as models see it that pad images (LLaVA-1.5, Fact-RLHF).
    """
    for name, value, known in (("captions", captions, CAPTIONS), ("frame", frame, FRAMES)):
        if value not in known:
            raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(known)}.")
    need(record, ["id", "image", "captions", "size", "boxes"])
    marked = list_of_texts(record["captions"], "caption")
    if not marked:
        raise BadRecord("no caption")
    width, height = record["size"]
    if min(width, height) < 1:
        raise BadRecord("an image without size", f"{width} x {height}")
    placed = Frame(width, height, frame)
    name = str(record["id"])
    facts = [_tidy(PHRASE.sub(r"\2", caption)) for caption in marked]
    rows = [
        prompt_row(
            record["image"],
            user_turn(drawn_one(REQUESTS, name)),
            completion=assistant_turn(clean_reply(spotting_caption(caption, record["boxes"], placed))),
            facts=facts,
            id=name,
        )
        for caption in (marked if captions == "all" else [drawn_one(marked, name)])
    ]
    return Converted(rows)


class Frame:
    """What the boxes of an image are measured in.

    Args:
        width: Of the image, in pixels.
        height: Of the image.
        kind: "image", or "square": the image in the middle of a square of its longer side.
    """

    def __init__(self, width: int, height: int, kind: str):
        longer = max(width, height)
        self.sides = (longer, longer) if kind == "square" else (width, height)
        self.offsets = ((self.sides[0] - width) // 2, (self.sides[1] - height) // 2)

    def text(self, box: Box) -> str:
        """The corners of a box as shares of the sides: `0.100,0.100,0.300,0.750`."""
        shares = ((value + self.offsets[place % 2]) / self.sides[place % 2] for place, value in enumerate(box))
        return ",".join(f"{min(max(share, 0.0), 1.0):.3f}" for share in shares)


def spotting_caption(caption: str, boxes: Mapping[str, Sequence[Box]], frame: Frame) -> str:
    """The caption with the boxes of each phrase behind it; a phrase without box, such as a scene, stays alone."""

    def with_boxes(phrase: re.Match) -> str:
        places = ";".join(frame.text(box) for box in boxes.get(phrase[1], ()))
        return f"{phrase[2]} [{places}]" if places else phrase[2]

    return _tidy(PHRASE.sub(with_boxes, caption))


def _tidy(caption: str) -> str:
    """The caption without the white space that its tokens leave before punctuation."""
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(caption.split()))
