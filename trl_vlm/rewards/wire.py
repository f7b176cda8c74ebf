"""Rows on their way to a reward server: JSON, with images as data URIs of the bytes of their files."""

import base64
import io
import json
from collections.abc import Mapping, MutableMapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from trl_vlm.data.errors import RowTypeError
from trl_vlm.data.images import image_pixels, load_image
from trl_vlm.rewards.rows import JudgedRow

DATA_URI = "data:application/octet-stream;base64,"


def row_as_json(row: JudgedRow, known: MutableMapping[int, str]) -> str:
    """A row as the server reads it.

    Args:
        row: The row.
        known: Data URIs by `id` of their image, read and filled in: the replies of a group share their images.

    Raises:
        RowError: An image is missing or is none, or the prompt holds something that JSON cannot.
    """
    uris = []
    for place, image in enumerate(row.images):
        if id(image) not in known:
            known[id(image)] = image_uri(image, f"{row.name}, image {place}")
        uris.append(known[id(image)])
    about = {"name": row.name, "prompt": row.prompt, "completion": row.completion, "facts": list(row.facts)}
    try:
        return json.dumps({**about, "images": uris})
    except TypeError as error:
        raise RowTypeError(
            f"{row.name}: the prompt holds something that cannot be sent to a reward server ({error}). Its parts must "
            "be text and images."
        ) from error


def rows_as_json(rows: Sequence[str]) -> bytes:
    """The body of a request, made of rows as `row_as_json` returns them."""
    return f'{{"rows": [{", ".join(rows)}]}}'.encode()


def image_uri(value: object, name: str) -> str:
    """An image as a data URI: the bytes of its file as they are, and of what is decoded already a PNG of its pixels.

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
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
        value = buffer.getvalue()
    return DATA_URI + base64.b64encode(value).decode()
