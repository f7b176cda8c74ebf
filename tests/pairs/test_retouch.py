import random

import numpy as np
import pytest
from PIL import Image

from tests.families import build, image
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.models.generation import Policy, generating
from trl_vlm.pairs import Retouched, SelfSamples
from trl_vlm.pairs.retouch import with_few_pixels, with_other_colors


def noisy(width=60, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_rows(count=3):
    return [
        {
            "images": [image(place)] * (1 + place % 2),
            "prompt": [{"role": "user", "content": "What is it? " * (place + 1)}],
            "completion": [{"role": "assistant", "content": "A red square."}],
            ROW_NAME: f"train row {place}",
        }
        for place in range(count)
    ]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def policy(request):
    return Policy(*build(request.param, sharp=4))


def made(policy, rows=None, round=0, **options):
    with generating(policy.model):
        return Retouched(**{"max_new_tokens": 6, **options})(rows or make_rows(), policy, round)


def hue_of(picture):
    return int(np.array(picture.convert("HSV"))[0, 0, 0])


def test_hue_and_brightness_are_drawn_within_their_ranges():
    red, draws = Image.new("RGB", (4, 4), (200, 20, 20)), random.Random(0)
    found = [with_other_colors(red, draws, brightness=0.5, hue=0.3) for _ in range(300)]
    turns = [(hue_of(each) + 128) % 256 - 128 for each in found]
    assert -79 <= min(turns) < -60 and 60 < max(turns) <= 79
    values = [max(each.getpixel((0, 0))) for each in found]
    assert 98 <= min(values) < 120 and 240 < max(values) <= 255
    assert red.getpixel((0, 0)) == (200, 20, 20)


def test_without_change_the_colors_stay():
    before = np.array(noisy()).astype(int)
    after = np.array(with_other_colors(noisy(), random.Random(0), brightness=0, hue=0)).astype(int)
    assert abs(before - after).max() <= 8 and abs(before - after).mean() < 1  # HSV in bytes


def test_a_low_resolution_keeps_the_size_and_loses_the_detail():
    found = with_few_pixels(noisy(), 4)
    assert found.size == (60, 40)
    assert np.array(found).std() < 0.5 * np.array(noisy()).std()
    assert np.array_equal(np.array(with_few_pixels(noisy(), 40)), np.array(noisy()))
    assert with_few_pixels(Image.new("RGB", (300, 1)), 1).size == (300, 1)


def test_rejected_replies_are_samples_to_the_retouched_images(policy):
    rows = make_rows()
    pairs = made(policy, rows, change="resolution", pixels=1)
    seen = [{**row, "images": [with_few_pixels(each, 1) for each in row["images"]]} for row in rows]
    with generating(policy.model):
        samples = SelfSamples(max_new_tokens=6)(seen, policy)
    assert [pair["rejected"] for pair in pairs] == [sample["rejected"] for sample in samples]
    for row, pair in zip(rows, pairs, strict=True):
        assert pair["images"] is row["images"] and pair["chosen"] == row["completion"]
        assert pair["pair_source"] == "retouched" and pair["pair_change"] == "resolution"


def test_either_draws_one_of_both_for_each_row(policy):
    rows = [{**make_rows(1)[0], ROW_NAME: f"train row {place}"} for place in range(12)]
    pairs = [pair for pair in made(policy, rows) if pair is not None]
    assert {pair["pair_change"] for pair in pairs} == {"color", "resolution"}


def test_pairs_hang_on_seed_round_and_row_alone(policy):
    rows = make_rows()
    together = made(policy, rows, seed=3)
    assert together == [made(policy, [row], seed=3)[0] for row in rows]
    assert together == made(policy, rows[::-1], seed=3)[::-1]
    assert together != made(policy, rows, seed=3, round=1)


def test_rows_without_image_are_refused(policy):
    with pytest.raises(ValueError, match="train row 0: it has no image that could be retouched"):
        made(policy, [{**make_rows(1)[0], "images": []}])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"change": "crop"}, "`change` is 'crop'; it must be one of color, resolution, either"),
        ({"brightness": 1.1}, "`brightness` is 1.1; it must be from 0 to 1"),
        ({"hue": 0.6}, "`hue` is 0.6; it must be from 0 to 0.5"),
        ({"pixels": 0}, "`pixels` is 0; it must be 1 or more"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
    ],
)
def test_options_out_of_range_are_refused(options, fault):
    with pytest.raises(ValueError, match=fault):
        Retouched(**options)
