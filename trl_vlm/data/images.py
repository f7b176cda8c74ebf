"""Images of a row: any form that a dataset holds becomes a verified RGB image, or an error that names the row."""

import hashlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from trl_vlm.data.errors import RowError, RowTypeError

# Pillow's own threshold for a decompression bomb: about 89 million pixels, three bytes each once decoded.
MAX_IMAGE_PIXELS = 1024 * 1024 * 1024 // 4 // 3
# Formats that hold pixels and nothing else. Pillow knows more: for EPS it starts Ghostscript, and some others are read
# by code that hardly anybody uses.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
IS_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
# What Pillow's decoders raise on damaged files: a PNG is a SyntaxError, its overlong text a ValueError, and so on.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    AssertionError,
    MemoryError,
    struct.error,
    zlib.error,
)
LONGEST_PATH = 300  # of a path that is believed to be one

# Kinds of faults, to count them by.
NO_FILE = "no image file"
NO_IMAGE = "not an image"
DAMAGED = "a damaged image"
EMPTY = "an empty image"
TOO_LARGE = "an image with too many pixels"
UNKNOWN_RANGE = "an image in an unknown range"
ADDRESS = "an address in place of an image"
WRONG_TYPE = "wrong type"

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # one channel of more than 8 bits


def load_image(
    value: object, *, name: str, max_pixels: int | None = MAX_IMAGE_PIXELS, at_least: int | None = None
) -> Image.Image:
    """The image as a decoded RGB `PIL.Image`, turned upright as its EXIF data say.

    The size is read from the header and checked before anything is decoded. Grayscale images of 16 bits, and
    floating-point ones with values up to 1 or up to 255, are scaled to 8 bits; other ranges are refused, since Pillow
    would clip them to white or black.

    Args:
        value: A `PIL.Image`, a path, the bytes of an image file, a dictionary {"bytes": ..., "path": ...} as
            `datasets` stores it, or a NumPy array of RGB pixels, (H, W, 3) of uint8. Not modified.
        name: What the image is called in errors, for example "row 12, image 1".
        max_pixels: Width times height at most; None lifts our limit (Pillow's own, twice `MAX_IMAGE_PIXELS`, stays).
        at_least: A JPEG may be decoded at a half, a quarter or an eighth of its size, as long as both sides keep this
            many pixels: several times faster, for thumbnails.

    Raises:
        RowError: The file is missing, empty, truncated, no image of a known format, or too large. A `ValueError`.
        RowTypeError: `value` is none of the above. A `TypeError` too.
    """
    with _naming(value, name):
        image = _sized(value, name, max_pixels)
        if at_least is not None and image is not value:
            image.draft("RGB", (at_least, at_least))
        # Without the copies that Pillow makes of an image that is upright, or RGB, as it is.
        upright = ImageOps.exif_transpose(image, in_place=image is not value)
        return as_rgb(image if upright is None else upright, name)


def image_pixels(value: object, *, name: str, max_pixels: int | None = MAX_IMAGE_PIXELS) -> int:
    """The pixels of an image, width times height, by its header: nothing is decoded.

    Args:
        value: The image, as for `load_image`.
        name: What the image is called in errors.
        max_pixels: As for `load_image`.

    Raises:
        RowError: See `load_image`; damage behind the header is not seen.
    """
    with _naming(value, name):
        image = _sized(value, name, max_pixels)
        pixels = image.width * image.height
        if image is not value:
            image.close()
        return pixels


@contextmanager
def _naming(value: object, name: str) -> Iterator[None]:
    """A context in which whatever is wrong with an image becomes an error that names it."""
    try:
        yield
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(f"{name}: {error}. Scale the image down before training.", TOO_LARGE) from error
    except UnidentifiedImageError as error:
        raise RowError(
            f"{name}: {_origin(value)} is not an image that Pillow can read. Remove or replace the file. "
            f"Formats: {', '.join(FORMATS)}.",
            NO_IMAGE,
        ) from error
    except DECODER_ERRORS as error:
        raise RowError(
            f"{name}: {_origin(value)} cannot be decoded ({error}); the file is damaged or cut short. "
            "Download it again, or remove the row.",
            DAMAGED,
        ) from error


def image_digest(value: object, *, name: str) -> str:
    """A digest of an image's pixels: the same for one picture under two names, or as PNG and as BMP.

    Args:
        value: The image, as for `load_image`.
        name: What the image is called in errors.

    Raises:
        RowError: See `load_image`.
    """
    image = load_image(value, name=name)
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def open_image(file: str | PathLike | io.BytesIO) -> Image.Image:
    """Opens a file or bytes in one of `FORMATS`; pixels stay undecoded."""
    return Image.open(file, formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(format_ for format_ in FORMATS if format_ in Image.OPEN)


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """The image in RGB, 8 bits per channel; more bits are scaled by the range that the format defines."""
    if image.mode not in DEEP_MODES:
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    # Pillow opens a PNG of 16 bits as "I;16", and did as "I" before version 11.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if is_16_bit:
        values *= 255 / 65535
    elif image.mode == "F" and low >= 0 and high <= 1:
        values *= 255
    elif not (low >= 0 and high <= 255):  # also with a NaN
        raise RowError(
            f"{name}: the values of the image run from {low:g} to {high:g} (mode {image.mode!r}), a range whose black "
            "and white are unknown. Save it with 8 bits per channel, as PNG or JPEG.",
            UNKNOWN_RANGE,
        )
    return Image.fromarray((values + 0.5).astype(np.uint8)).convert("RGB")


def _sized(value: object, name: str, max_pixels: int | None) -> Image.Image:
    """The image with its header read, and not too large."""
    with warnings.catch_warnings():
        # Pillow warns between its limit and twice that; the limit here is `max_pixels`.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = _opened(value, name)
    _check_size(image, name, max_pixels)
    return image


def _opened(value: object, name: str) -> Image.Image:
    """The image with its header read; pixels may still be undecoded."""
    if isinstance(value, Image.Image):
        _check_format(value, name)
        return value
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            value = value["bytes"]
        elif value.get("path") is not None:
            value = value["path"]
        else:
            raise RowError(
                f"{name}: the image dictionary has neither 'bytes' nor 'path' (keys: {sorted(map(str, value))}). "
                "Fill one of the two, or leave the image out of the row's list.",
                NO_FILE,
            )
    if isinstance(value, bytes | bytearray):
        if not value:
            raise RowError(f"{name}: the image has zero bytes. Remove the row, or store the image again.", EMPTY)
        return open_image(io.BytesIO(value))
    if isinstance(value, str | PathLike):
        return _opened_file(value, name)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] == 3:
        return Image.fromarray(value)
    raise RowTypeError(
        f"{name}: an image came as {_described(value)}. Pass a PIL image, a path, the bytes of an image file, "
        "{'bytes': ..., 'path': ...}, or a NumPy array of RGB pixels: uint8, of the shape (height, width, 3).",
        WRONG_TYPE,
    )


def _described(value: object) -> str:
    """The type of a value; of an array or tensor with its precision and shape, which say what the numbers mean."""
    shape, precision = getattr(value, "shape", None), getattr(value, "dtype", None)
    kind = type(value).__name__
    return kind if shape is None or precision is None else f"{kind} of {precision} and the shape {tuple(shape)}"


def _opened_file(path: str | PathLike, name: str) -> Image.Image:
    if IS_ADDRESS.match(str(path)):
        raise RowError(
            f"{name}: {str(path)[:200]!r} is an address, and training opens no network connection. "
            "Download the images first and put their paths into the row.",
            ADDRESS,
        )
    file = Path(path)
    if not is_file(file):
        if len(str(path)) > LONGEST_PATH:
            raise RowError(
                f"{name}: there is no image file {str(path)[:40]!r}..., of {len(str(path))} characters. If this is an "
                "image in base64, decode it (`base64.b64decode`) and put the bytes into the row.",
                NO_FILE,
            )
        raise RowError(
            f"{name}: there is no image file {str(path)[:400]!r}. "
            "Relative paths start at the working directory; check the path, or remove the row.",
            NO_FILE,
        )
    if file.stat().st_size == 0:
        raise RowError(
            f"{name}: the image file {str(path)!r} has zero bytes. Download it again, or remove the row.", EMPTY
        )
    return open_image(file)


def is_file(path: Path) -> bool:
    """Whether there is such a file; False for an impossible name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, forbidden to look at, or with a zero byte
        return False


def _check_format(image: Image.Image, name: str) -> None:
    """A `PIL.Image` that was opened elsewhere, which may still have to be decoded."""
    if image.format is not None and image.format not in FORMATS and isinstance(image, ImageFile.ImageFile):
        raise RowError(
            f"{name}: the image is a file of the format {image.format}, which is not decoded here. "
            f"Save it as one of {', '.join(FORMATS)}.",
            NO_IMAGE,
        )


def _check_size(image: Image.Image, name: str, max_pixels: int | None) -> None:
    width, height = image.size
    if width * height == 0:
        raise RowError(f"{name}: the image measures {width} x {height} pixels. Remove or replace it.", EMPTY)
    if max_pixels is not None and width * height > max_pixels:
        raise RowError(
            f"{name}: the image measures {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{max_pixels:,}. Scale it down, or raise the limit (`max_image_pixels`).",
            TOO_LARGE,
        )


def _origin(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str | PathLike):
        return f"the file {str(value)[:400]!r}"
    return "the image" if isinstance(value, Image.Image) else "its bytes"
