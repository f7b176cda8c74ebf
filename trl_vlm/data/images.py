"""Images of a row: from whatever a dataset holds to a verified RGB image, or an error that names the row."""

import io
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from trl_vlm.data.errors import RowError, RowTypeError

# Pillow's own threshold for a decompression bomb: about 89 million pixels, three bytes each once decoded.
MAX_IMAGE_PIXELS = 1024 * 1024 * 1024 // 4 // 3


def load_image(value: Any, *, name: str, max_pixels: int | None = MAX_IMAGE_PIXELS) -> Image.Image:
    """Returns the image as a decoded RGB `PIL.Image`, turned upright as its EXIF data say.

    The size is read from the header and checked before anything is decoded.

    Args:
        value: A `PIL.Image`, a path, the bytes of an image file, or a dictionary {"bytes": ..., "path": ...} as
            `datasets` stores it. Not modified.
        name: What the image is called in errors, for example "row 12, image 1".
        max_pixels: Width times height at most; None lifts our limit (Pillow's own, twice `MAX_IMAGE_PIXELS`, stays).

    Raises:
        RowError: The file is missing, empty, truncated, no image, or too large; a `ValueError`.
        RowTypeError: `value` is none of the above; a `TypeError` as well.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns between its limit and twice that; the limit here is `max_pixels`.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _opened(value, name)
        _check_size(image, name, max_pixels)
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGB")
    except Image.DecompressionBombError as error:
        raise RowError(f"{name}: {error}. Scale the image down before training.") from error
    except UnidentifiedImageError as error:
        raise RowError(
            f"{name}: {_origin(value)} is not an image that Pillow can read. Remove or replace the file."
        ) from error
    except (OSError, SyntaxError, EOFError) as error:  # Pillow reports a damaged PNG as a SyntaxError
        raise RowError(
            f"{name}: {_origin(value)} cannot be decoded ({error}); the file is damaged or cut short. "
            "Download it again, or remove the row."
        ) from error


def _opened(value: Any, name: str) -> Image.Image:
    """The image with its header read; pixels may still be undecoded."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            value = value["bytes"]
        elif value.get("path") is not None:
            value = value["path"]
        else:
            raise RowError(
                f"{name}: the image dictionary has neither 'bytes' nor 'path' (keys: {sorted(value)}). "
                "Fill one of the two, or leave the image out of the row's list."
            )
    if isinstance(value, bytes | bytearray):
        if not value:
            raise RowError(f"{name}: the image has zero bytes. Remove the row, or store the image again.")
        return Image.open(io.BytesIO(value))
    if isinstance(value, str | PathLike):
        return _opened_file(value, name)
    raise RowTypeError(
        f"{name}: an image came as {type(value).__name__}. "
        "Pass a PIL image, a path, the bytes of an image file, or {'bytes': ..., 'path': ...}."
    )


def _opened_file(path: str | PathLike, name: str) -> Image.Image:
    if str(path).startswith(("http://", "https://")):
        raise RowError(
            f"{name}: {str(path)!r} is an address, and training opens no network connection. "
            "Download the images first and put their paths into the row."
        )
    file = Path(path)
    if not file.is_file():
        raise RowError(
            f"{name}: there is no image file {str(path)!r}. "
            "Relative paths start at the working directory; check the path, or remove the row."
        )
    if file.stat().st_size == 0:
        raise RowError(f"{name}: the image file {str(path)!r} has zero bytes. Download it again, or remove the row.")
    return Image.open(file)


def _check_size(image: Image.Image, name: str, max_pixels: int | None) -> None:
    width, height = image.size
    if width * height == 0:
        raise RowError(f"{name}: the image measures {width} x {height} pixels. Remove or replace it.")
    if max_pixels is not None and width * height > max_pixels:
        raise RowError(
            f"{name}: the image measures {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{max_pixels:,}. Scale it down, or raise the limit (`max_image_pixels`)."
        )


def _origin(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str | PathLike):
        return f"the file {str(value)!r}"
    return "the image" if isinstance(value, Image.Image) else "its bytes"
