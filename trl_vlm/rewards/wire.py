"""Rows on their way to a reward server: JSON, with images as data URIs of the bytes of their files."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from trl_vlm.data.errors import RowTypeError
from trl_vlm.data.images import image_pixels, load_image
from trl_vlm.rewards.rows import JudgedRow

DATA_URI = "data:application/octet-stream;base64,"


def row_as_json(row: JudgedRow, places: Sequence[int]) -> str:
    """A row as the server reads it.

    Args:
        row: The row.
        places: Which of the request's images are its own: the replies of a group share theirs.

    Raises:
        RowTypeError: The prompt holds something that JSON cannot.
    """
    about = {"name": row.name, "prompt": row.prompt, "completion": row.completion, "facts": list(row.facts)}
    try:
        return json.dumps({**about, "images": places})
    except TypeError as error:
        raise RowTypeError(
            f"{row.name}: the prompt holds something that cannot be sent to a reward server ({error}). Its parts must "
            "be text and images."
        ) from error


def request_body(rows: Sequence[str], images: Sequence[str]) -> bytes:
    """The body of a request.

    Args:
        rows: As `row_as_json` returns them.
        images: Data URIs, which hold nothing that JSON would escape.
    """
    quoted = ", ".join(f'"{image}"' for image in images)
    return f'{{"rows": [{", ".join(rows)}], "images": [{quoted}]}}'.encode()


def image_uri(value: object, name: str) -> str:
    """An image as a data URI: the bytes of its file as they are, and of what is decoded already a BMP of its pixels.

    Args:
        value: An image in any form that `load_image` reads.
        name: What errors call it.

    Raises:
        RowError: It is missing, or no image; nothing else leaves this machine.
    """
    image_pixels(value, name=name, max_pixels=None)  # the server has its own limit
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str | PathLike):
        value = Path(value).read_bytes()
    if not isinstance(value, bytes | bytearray):
        # Only the pixels: what a decoded image remembers of its file (its orientation, say) would count twice.
        pixels, buffer = np.asarray(load_image(value, name=name, max_pixels=None)), io.BytesIO()
        # Of a photo of 640 x 480 a PNG costs 55 ms to write and read, and saves a quarter of the bytes; a BMP 2 ms.
        Image.fromarray(pixels).save(buffer, format="BMP")
        value = buffer.getvalue()
    return DATA_URI + base64.b64encode(value).decode()
