import io
from pathlib import Path

import pytest
from PIL import Image

from tests.data.converters.helpers import image_folder, png
from trl_vlm.data.converters import BadRecord
from trl_vlm.data.io.image_files import stored_image


def test_bytes_stay_what_they_are():
    assert stored_image(png()) == {"bytes": png(), "path": None}
    assert stored_image({"bytes": png(), "path": "folder/a.png"}) == {"bytes": png(), "path": "a.png"}


def test_a_picture_is_stored_without_loss():
    picture = Image.effect_noise((9, 7), 50).convert("RGB")
    stored = Image.open(io.BytesIO(stored_image(picture)["bytes"]))
    assert stored.tobytes() == picture.tobytes()


@pytest.mark.parametrize("name", ["a.png", "./coco/a.png", "/other/coco/a.png", {"bytes": None, "path": "x/a.png"}])
def test_a_file_is_found_in_the_folder_by_its_last_part(tmp_path, name):
    folder = image_folder(tmp_path / "images", "a.png")
    assert stored_image(name, folder=folder) == {"bytes": None, "path": str(folder / "a.png")}


def test_the_whole_name_goes_before_its_last_part(tmp_path):
    folder = image_folder(tmp_path, "a.png")
    image_folder(tmp_path / "coco", "a.png")
    assert stored_image("coco/a.png", folder=folder)["path"] == str(tmp_path / "coco" / "a.png")


def test_a_file_can_be_read_into_the_row(tmp_path):
    file = image_folder(tmp_path, "a.png") / "a.png"
    assert stored_image(Path(file), embed=True) == {"bytes": file.read_bytes(), "path": "a.png"}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "missing image"),
        ({"bytes": None, "path": None}, "missing image"),
        (b"<html>not found</html>", "not an image: its bytes is no image"),
        ("empty.png", "not an image"),
        ("gone.png", "image file not found: looked for .*gone.png"),
        ("https://host/a.png", "image is an address"),
        (3, "image of an unknown kind: int"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, value, fault):
    (tmp_path / "empty.png").touch()
    with pytest.raises(BadRecord, match=fault):
        stored_image(value, folder=tmp_path)


def test_without_a_folder_the_error_says_how_to_name_one():
    with pytest.raises(BadRecord, match="Name the folder of images .*--images"):
        stored_image("gone.png")
