import io

import numpy as np
import pytest
from PIL import Image

from tests.families import image
from trl_vlm.data.images import load_image


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
    with pytest.raises(TypeError, match="row 6: an image came as ndarray"):
        load_image(np.zeros((4, 4, 3)), name="row 6")
