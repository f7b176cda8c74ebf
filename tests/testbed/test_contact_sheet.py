import numpy as np
import pytest
from PIL import Image

from trl_vlm.testbed.contact_sheet import draw_cards, write_contact_sheet


def test_the_page_shows_every_picture_and_strikes_out_what_is_not_there(world, tmp_path):
    page = write_contact_sheet(world, tmp_path / "new" / "sheet.html", count=4).read_text()
    assert page.count("<img") == 12
    cards = draw_cards(world, 4, 0, "adv")
    invented = [
        word
        for card in cards
        for word in card.texts["biased"].split()
        if word in world.kinds and word not in card.picture.scene.kinds
    ]
    assert invented
    assert all(f"<del>{word}</del>" in page for word in invented)


def test_the_poster_contains_the_pictures(world, tmp_path):
    poster = np.asarray(Image.open(write_contact_sheet(world, tmp_path / "sheet.png", count=1)))
    image = np.asarray(draw_cards(world, 1, 0, "iid")[0].picture.image)
    enlarged = image.repeat(4, 0).repeat(4, 1)
    height, width = enlarged.shape[:2]
    assert any((poster[top : top + height, 8 : 8 + width] == enlarged).all() for top in range(100))


def test_another_kind_of_file_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"\.html or a \.png"):
        write_contact_sheet(world, tmp_path / "sheet.pdf")
