import io
import re
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


def saved(folder, name, kind="PNG"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), "blue").save(folder / name, format=kind)
    return folder / name


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize(
    "form", ["../secret.png", "{outside}/secret.png", "a/../../secret.png", "link.png", "far/secret.png"]
)
def test_no_name_leads_out_of_the_folder_of_images(tmp_path, form, embed):
    secret = saved(tmp_path, "secret.png")
    folder = image_folder(tmp_path / "images" / "a", "b.png").parent
    (folder / "link.png").symlink_to(secret)
    (folder / "far").symlink_to(tmp_path)
    name = form.format(outside=tmp_path)
    for value in (name, {"bytes": None, "path": name}):
        with pytest.raises(BadRecord, match="image is outside the folder of images: .*secret.png"):
            stored_image(value, folder=folder, embed=embed)


def test_links_within_the_folder_a_linked_folder_and_a_download_of_the_hub_are_read(tmp_path):
    folder = image_folder(tmp_path / "images", "a.png")
    (folder / "b.png").symlink_to(folder / "a.png")
    (tmp_path / "elsewhere").symlink_to(folder)
    assert stored_image("b.png", folder=tmp_path / "elsewhere")["path"] == str(folder / "a.png")
    assert stored_image(str(folder / "a.png"), folder=folder)["path"] == str(folder / "a.png")
    blob = saved(tmp_path / "hub" / "blobs", "0123")
    snapshot = tmp_path / "hub" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "c.png").symlink_to(blob)
    assert stored_image("c.png", folder=snapshot, embed=True)["path"] == "c.png"


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("run.py", "PNG", "run.png"),
        ("photo.jpg", "PNG", "photo.png"),
        ("photo.JPEG", "JPEG", "photo.JPEG"),
        ("photo.tiff", "TIFF", "photo.tiff"),
        ("photo", "WEBP", "photo.webp"),
        ("a.b.png", "PNG", "a.b.png"),
        ("Straße 5.png", "PNG", "Straße 5.png"),
        ("c:\\photos\\a.exe", "PNG", "a.png"),
        (".bashrc", "PNG", None),
        ("..", "PNG", None),
        ("a\nb.png", "PNG", None),
        ("a;rm -rf $HOME.png", "PNG", None),
        ("x" * 300 + ".png", "PNG", None),
        ("x." + "y" * 300, "PNG", "x.png"),
        (3, "PNG", "3.png"),
    ],
)
def test_an_embedded_image_has_a_plain_name_with_the_suffix_of_its_format(name, kind, wanted):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), "blue").save(buffer, format=kind)
    path = stored_image({"bytes": buffer.getvalue(), "path": name})["path"]
    assert path == wanted or (wanted is None and re.fullmatch(r"[0-9a-f]{24}\.png", path))


def test_a_file_with_the_wrong_suffix_is_embedded_with_the_right_one(tmp_path):
    saved(tmp_path, "photo.py")
    assert stored_image("photo.py", folder=tmp_path, embed=True)["path"] == "photo.png"


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "a/" * 3000])
def test_a_name_that_no_file_can_have_is_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(BadRecord, match="image file not found"):
        stored_image(name, folder=tmp_path)
