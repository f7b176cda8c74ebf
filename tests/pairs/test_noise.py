import numpy as np
import pytest
import torch
from PIL import Image

from trl_vlm.pairs import distorted, noise_level

# sqrt of the product of 1 - beta, and the standard deviation.
LEVELS = {
    ("paper", 100): (0.998305, 0.058200),
    ("paper", 200): (0.993898, 0.110301),
    ("paper", 300): (0.981039, 0.193810),
    ("paper", 400): (0.945039, 0.326959),
    ("paper", 500): (0.863444, 0.504444),
    ("paper", 1000): (0.284688, 0.958620),
    ("code", 100): (0.998293, 0.058406),
    ("code", 200): (0.993879, 0.110475),
    ("code", 300): (0.980984, 0.194089),
    ("code", 400): (0.944860, 0.327476),
    ("code", 500): (0.863017, 0.505175),
    ("code", 999): (0.285042, 0.958515),
}


@pytest.mark.parametrize(("key", "level"), LEVELS.items(), ids=str)
def test_noise_levels_meet_the_published_schedule(key, level):
    indexing, steps = key
    assert noise_level(steps, indexing) == pytest.approx(level, abs=1e-6)


def test_the_closed_form_is_the_product_of_single_steps():
    signal = 1.0
    for k in range(1, 8):
        beta = (0.5e-2 - 1e-5) / (1 + np.exp(6 - 12 * k / 1000)) + 1e-5
        signal *= (1 - beta) ** 0.5
    assert noise_level(7).signal == pytest.approx(signal, rel=1e-12)
    assert noise_level(7).noise == pytest.approx((1 - signal**2) ** 0.5, rel=1e-9)


def test_no_step_leaves_the_image():
    image = Image.effect_noise((12, 9), 80).convert("RGB")
    assert noise_level(0) == (1, 0)
    assert distorted(image, 0, torch.Generator()).tobytes() == image.tobytes()


def test_an_image_keeps_its_size_and_is_not_touched():
    image = Image.new("RGB", (7, 5), (10, 200, 30))
    noisy = distorted(image, 500, torch.Generator().manual_seed(0))
    assert noisy.size == (7, 5) and noisy.mode == "RGB"
    assert image.getpixel((0, 0)) == (10, 200, 30) and noisy.tobytes() != image.tobytes()


def by_hand(image, steps, seed, indexing="paper"):
    """What the noise makes of an image, as floats from 0 to 255 before it is written back."""
    level = noise_level(steps, indexing)
    colours = np.asarray(image, dtype=np.float32) / 255
    noise = torch.randn(colours.shape, generator=torch.Generator().manual_seed(seed)).numpy()
    return (level.signal * colours + level.noise * noise) * 255


@pytest.mark.parametrize("indexing", ["paper", "code"])
def test_out_of_range_colours_wrap_around_or_are_clipped(indexing):
    image = Image.effect_noise((40, 30), 120).convert("RGB")
    values = by_hand(image, 500, 3, indexing)
    whole = np.trunc(values).astype(int)
    assert (whole < 0).any() and (whole > 255).any()
    wrapped, clipped = (
        np.asarray(distorted(image, 500, torch.Generator().manual_seed(3), indexing=indexing, overflow=overflow))
        for overflow in ("wrap", "clip")
    )
    assert (np.abs(wrapped.astype(int) - whole % 256) <= 1).mean() > 0.999  # the last bit of a float
    assert np.abs(clipped.astype(int) - whole.clip(0, 255)).max() <= 1
    inside = (whole >= 0) & (whole <= 255)
    assert (wrapped[inside] == clipped[inside]).all()
    assert wrapped[whole == -1].min(initial=255) == 255  # -1 is 255, not 0


def test_the_noise_has_the_spread_of_its_level():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    noisy = np.asarray(distorted(grey, 200, torch.Generator().manual_seed(0), overflow="clip"), dtype=float) / 255
    level = noise_level(200)
    assert noisy.std() == pytest.approx(level.noise, rel=0.01)
    assert noisy.mean() == pytest.approx(level.signal * 128 / 255, abs=0.003)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1001}, r"1001 steps of noise are out of range: the schedule \(paper\) has 0 to 1000"),
        ({"steps": 1000, "indexing": "code"}, r"the schedule \(code\) has 0 to 999"),
        ({"steps": -1}, "-1 steps"),
        ({"steps": 5, "indexing": "other"}, "must be 'paper' or 'code'"),
        ({"steps": 5, "overflow": "cut"}, "must be 'wrap' or 'clip'"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        distorted(Image.new("RGB", (2, 2)), generator=torch.Generator(), **arguments)
