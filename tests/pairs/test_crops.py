"""Random crops: a part of the image, at the image's own size."""

import random

import numpy as np
import pytest
from PIL import Image

from trl_vlm.pairs.crops import cropped


def gradient(width=120, height=80):
    """Each pixel says where it is."""
    columns, lines = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, lines, 0 * lines], -1).astype(np.uint8))


def test_200_crops_keep_the_size_and_show_a_share_of_the_area_in_the_range():
    image = gradient()
    before, draws = np.array(image), random.Random(0)
    for _ in range(200):
        found = cropped(image, draws, least=0.05, most=0.2)
        assert found.size == image.size
        values = np.array(found).reshape(-1, 3).astype(int)
        (width, height, _) = values.max(0) - values.min(0) + 1
        assert 0.03 < width * height / (120 * 80) < 0.24
    assert np.array_equal(np.array(image), before)


def test_the_same_draws_give_the_same_crop():
    one, same, other = (np.array(cropped(gradient(), random.Random(seed), least=0.01, most=0.2)) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_the_whole_area_and_images_of_a_line_are_cropped_too():
    assert cropped(gradient(), random.Random(0), least=1.0, most=1.0).size == (120, 80)
    assert cropped(gradient(200, 1), random.Random(0), least=0.01, most=0.2).size == (200, 1)


@pytest.mark.parametrize("areas", [(0.0, 0.2), (0.3, 0.2), (0.1, 1.1)])
def test_impossible_areas_are_refused(areas):
    with pytest.raises(ValueError, match="both must be above 0 and at most 1"):
        cropped(gradient(), random.Random(0), least=areas[0], most=areas[1])
