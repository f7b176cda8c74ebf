import io
import socket
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from tests.families import image
from trl_vlm.data.errors import RowError
from trl_vlm.data.images import FORMATS, image_pixels, load_image


def encoded(picture=None, kind="PNG", **options):
    buffer = io.BytesIO()
    (picture or image(0)).save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["pil", "path", "string", "bytes", "dictionary of bytes", "dictionary of a path"])
def test_every_form_of_an_image_gives_the_same_pixels(form, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded())
    value = {
        "pil": image(0),
        "path": path,
        "string": str(path),
        "bytes": encoded(),
        "dictionary of bytes": {"bytes": encoded(), "path": None},
        "dictionary of a path": {"bytes": None, "path": str(path)},
    }[form]
    loaded = load_image(value, name="row 0")
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.asarray(image(0)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode):
    assert load_image(image(0).convert(mode), name="row 0").mode == "RGB"


def test_an_image_taken_sideways_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert load_image(encoded(image(0, 60, 40), "JPEG", exif=exif), name="row 0").size == (40, 60)


def test_the_image_that_came_in_is_not_changed():
    value = image(0).convert("L")
    load_image(value, name="row 0")
    assert value.mode == "L"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_an_error_that_names_the_row(kind, share, tmp_path):
    whole = encoded(image(0, 200, 200), kind)
    path = tmp_path / "cut"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="row 7, image 1: .*cut"):
        load_image(path, name="row 7, image 1")


def test_a_file_with_damaged_bytes_is_an_error_that_names_the_row():
    whole = bytearray(encoded(image(0, 200, 200)))
    whole[60:400] = bytes(340)
    with pytest.raises(ValueError, match="row 7: its bytes cannot be decoded"):
        load_image(bytes(whole), name="row 7")


def test_a_missing_file_is_an_error_that_names_the_row_and_the_path(tmp_path):
    with pytest.raises(ValueError, match="row 3: there is no image file .*absent.png"):
        load_image(tmp_path / "absent.png", name="row 3")


def test_an_empty_file_and_empty_bytes_are_errors_that_name_the_row(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(ValueError, match="row 4: the image file .*empty.png' has zero bytes"):
        load_image(path, name="row 4")
    with pytest.raises(ValueError, match="row 4: the image has zero bytes"):
        load_image({"bytes": b"", "path": None}, name="row 4")


def test_an_enormous_image_is_refused_before_it_is_decoded():
    bomb = encoded(Image.new("1", (20_000, 10_000)))
    with pytest.raises(ValueError, match="row 5: .*pixels"):
        load_image(bomb, name="row 5")
    with pytest.raises(ValueError, match=r"row 5: the image measures 60 x 40 = 2,400 pixels.*max_image_pixels"):
        load_image(encoded(), name="row 5", max_pixels=2_399)
    assert load_image(encoded(), name="row 5", max_pixels=2_400).size == (60, 40)


def test_a_large_image_within_a_raised_limit_loads_without_a_warning(recwarn):
    large = encoded(Image.new("1", (10_000, 9_000)))
    with pytest.raises(ValueError, match="more than the limit"):
        load_image(large, name="row 5")
    assert load_image(large, name="row 5", max_pixels=None).size == (10_000, 9_000)
    assert not recwarn.list


def test_what_is_no_image_is_an_error_that_names_the_row():
    with pytest.raises(ValueError, match="row 6: its bytes is not an image"):
        load_image(b"hello", name="row 6")
    with pytest.raises(ValueError, match="row 6: 'https://example.org/a.png' is an address"):
        load_image("https://example.org/a.png", name="row 6")
    with pytest.raises(ValueError, match="row 6: the image dictionary has neither"):
        load_image({"bytes": None, "path": None}, name="row 6")


def test_an_array_of_rgb_pixels_is_an_image():
    pixels = np.asarray(image(0))
    assert np.array_equal(np.asarray(load_image(pixels, name="row 0")), pixels)
    with pytest.raises(ValueError, match=r"row 5: the image measures 60 x 40 = 2,400 pixels"):
        load_image(pixels, name="row 5", max_pixels=2_399)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((4, 5, 3)), r"ndarray of float64 and the shape \(4, 5, 3\)"),
        (np.zeros((3, 4, 5), np.uint8), r"ndarray of uint8 and the shape \(3, 4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"ndarray of uint8 and the shape \(4, 5, 4\)"),
        (np.zeros((4, 5), np.uint8), r"ndarray of uint8 and the shape \(4, 5\)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"Tensor of torch.uint8 and the shape \(4, 5, 3\)"),
        (3, "int"),
    ],
    ids=["floats", "channels first", "alpha", "grey", "tensor", "number"],
)
def test_numbers_that_do_not_say_what_they_mean_are_refused_with_the_form_that_does(value, said):
    needed = r"a NumPy array of RGB pixels: uint8, of the shape \(height, width, 3\)"
    with pytest.raises(TypeError, match=f"row 6: an image came as {said}.*{needed}"):
        load_image(value, name="row 6")


def png_of_16_bits(values):
    """The file of (H, W, channels), which Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    kind = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4], ids=["grey and alpha", "rgb", "rgb and alpha"])
def test_a_png_of_16_bits_per_color_keeps_the_upper_eight(channels):
    """Unlike grey ones (mode I;16), Pillow reduces them itself: less precise by at most one level, never clipped."""
    values = np.random.RandomState(0).randint(0, 65536, (16, 16, channels)).astype(np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    wanted = values[..., :3] if channels > 2 else values[..., :1].repeat(3, axis=-1)
    found = np.asarray(load_image(png_of_16_bits(values), name="row 0"))
    assert np.array_equal(found, wanted >> 8)
    assert np.abs(found - wanted / 257).max() < 1


RAMP = np.linspace(0, 1, 256).reshape(8, 32)


def levels(value):
    return np.asarray(load_image(value, name="row 0"))[..., 0].astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_grey_image_of_16_bits_keeps_its_shades(kind):
    deep = Image.fromarray((RAMP * 65535).round().astype(np.uint16))
    assert np.abs(levels(encoded(deep, kind)) - RAMP * 255).max() <= 1
    assert np.abs(levels(deep) - RAMP * 255).max() <= 1
    big_endian = Image.frombytes("I;16B", (32, 8), (RAMP * 65535).round().astype(">u2").tobytes())
    assert np.abs(levels(big_endian) - RAMP * 255).max() <= 1


@pytest.mark.parametrize("scale", [1, 255])
def test_a_floating_point_image_keeps_its_shades(scale):
    floats = Image.fromarray((RAMP * scale).astype(np.float32))
    assert np.abs(levels(encoded(floats, "TIFF")) - RAMP * 255).max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        np.float32([[0.0, 3000.0]]),
        np.float32([[-1.0, 1.0]]),
        np.float32([[0.0, np.nan]]),
        np.float32([[0.0, np.inf]]),
        np.int32([[0, 70_000]]),
        np.int32([[-5, 5]]),
    ],
)
def test_values_without_a_known_range_are_refused_and_never_clipped(values):
    with pytest.raises(RowError, match="row 0: the values of the image run from .* Save it with 8 bits"):
        load_image(encoded(Image.fromarray(values), "TIFF"), name="row 0")


def test_a_16_bit_image_taken_sideways_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((RAMP * 65535).astype(np.uint16))
    assert load_image(encoded(deep, "PNG", exif=exif), name="row 0").size == (8, 32)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "SGI", "DDS", "ICNS"])
def test_formats_that_are_not_listed_are_not_opened(kind, monkeypatch, tmp_path):
    def start(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    path = tmp_path / "photo.png"
    path.write_bytes(EPS if kind == "EPS" else encoded(image(0, 32, 32), kind))
    for value in (path, path.read_bytes(), {"bytes": path.read_bytes(), "path": "photo.png"}):
        with pytest.raises(RowError, match="row 1: .* is not an image that Pillow can read"):
            load_image(value, name="row 1")
    if kind == "EPS":
        with pytest.raises(RowError, match="row 1: the image is a file of the format EPS"):
            load_image(Image.open(path), name="row 1")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO"])
def test_formats_that_are_listed_are_opened(kind):
    assert kind in FORMATS
    assert load_image(encoded(image(0, 32, 32), kind), name="row 1").size == (32, 32)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_png_with_a_mebibyte_of_text_is_an_error_that_names_the_row():
    text = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
    whole = encoded()
    end = len(whole) - 12
    bomb = whole[:33] + chunk(b"zTXt", b"comment\x00\x00" + text) + whole[33:end] + whole[end:]
    with pytest.raises(RowError, match="row 8: its bytes cannot be decoded .*too large"):
        load_image(bomb, name="row 8")


def test_a_colour_space_that_pillow_cannot_convert_is_an_error_that_names_the_row():
    with pytest.raises(RowError, match="row 8: the image cannot be decoded"):
        load_image(Image.new("La", (4, 4)), name="row 8")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO"])
def test_whatever_damage_gives_an_image_or_an_error_that_names_the_row(kind):
    whole, draw = encoded(image(0, 48, 48), kind), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in draw.integers(0, min(len(whole), 200), size=4):
            damaged[place] = draw.integers(256)
        try:
            assert load_image(bytes(damaged), name="row 9", max_pixels=10**6).mode == "RGB"
        except RowError as error:
            assert str(error).startswith("row 9: ")


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9/a.png",
        "HTTPS://host/a.png",
        "ftp://host/a.png",
        "hf://datasets/owner/name/a.png",
        "s3://bucket/a.png",
        "file:///etc/a.png",
        "zip://a.png::http://host/b.zip",
        "data:image/png;base64,iVBORw0KGgo=",
    ],
)
def test_no_address_is_opened(address, monkeypatch):
    def connect(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    for value in (address, {"bytes": None, "path": address}):
        with pytest.raises(RowError, match="row 6: .* is an address, and training opens no network connection"):
            load_image(value, name="row 6")


@pytest.mark.parametrize("path", ["a" * 300 + ".png", "a\x00b.png", "/dev/zero", "."])
def test_names_that_are_no_file_are_errors_that_name_the_row(path):
    with pytest.raises(RowError, match="row 6: there is no image file"):
        load_image(path, name="row 6")


def test_the_size_is_read_from_the_header_alone(tmp_path):
    whole = encoded()
    assert image_pixels(whole[:60], name="row 0") == 60 * 40
    (tmp_path / "image.png").write_bytes(whole)
    assert image_pixels(tmp_path / "image.png", name="row 0") == image_pixels(image(0), name="row 0") == 60 * 40
    with pytest.raises(RowError, match="row 3: the image measures 60 x 40 = 2,400 pixels, more than the limit of 99"):
        image_pixels(whole, name="row 3", max_pixels=99)
    with pytest.raises(RowError, match="row 3: its bytes is not an image"):
        image_pixels(b"not one", name="row 3")
