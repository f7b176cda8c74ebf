"""Images of a record as a data set stores them: `{"bytes", "path"}`, found and seen to be images."""

import io
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from trl_vlm.data.converters.records import BadRecord, present_image


def stored_image(value: Any, *, folder: Path | None = None, embed: bool = False) -> dict[str, Any]:
    """An image as `{"bytes", "path"}`: bytes stay bytes, a file stays a path unless `embed`.

    The header alone is read, to tell an image from an error page; `trl-vlm check` decodes the pixels.

    Args:
        value: `PIL.Image`, bytes, a path or a file name, or `{"bytes", "path"}`.
        folder: Where named files are: under the name as it stands, else under its last part. Without it, names are
            relative to the working directory.
        embed: Read files into bytes, so that the data set needs no folder of images beside it.

    Raises:
        BadRecord: No image, a file that is not there, or something that is no image.
    """
    value = present_image(value)
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}
    name = None
    if isinstance(value, Mapping):
        name, value = value.get("path"), value.get("bytes") or value["path"]
    if isinstance(value, bytes | bytearray):
        refuse_what_is_no_image(io.BytesIO(value), "its bytes")
        return {"bytes": bytes(value), "path": PurePosixPath(name).name if name else None}
    if not isinstance(value, str | PathLike):
        raise BadRecord("image of an unknown kind", f"{type(value).__name__}; a path, bytes or PIL image is needed")
    path = found_image(str(value), folder)
    refuse_what_is_no_image(path, str(path))
    if embed:
        return {"bytes": path.read_bytes(), "path": path.name}
    return {"bytes": None, "path": str(path.resolve())}


def found_image(name: str, folder: Path | None) -> Path:
    """The file called `name`, in `folder` if there is one."""
    if "://" in name:
        raise BadRecord("image is an address", f"{name!r}; download the images and name their folder")
    places = [Path(name)] if folder is None else [folder / name, folder / PurePosixPath(name).name]
    for place in places:
        if place.is_file():
            return place
    looked = " and ".join(repr(str(place)) for place in dict.fromkeys(places))
    remedy = "Name the folder of images (`images`, on the command line --images)."
    if folder is not None:
        remedy = "Is it the right folder of images?"
    raise BadRecord("image file not found", f"looked for {looked}. {remedy}")


def refuse_what_is_no_image(file: Path | io.BytesIO, what: str) -> None:
    """Raises `BadRecord` where Pillow does not know the header, or it announces an enormous image."""
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of the size at which it refuses; training has its own limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file):
                pass
    except UnidentifiedImageError as error:
        raise BadRecord("not an image", f"{what} is no image that Pillow can read") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRecord("not an image", f"{what}: {error}") from error
