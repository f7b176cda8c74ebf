"""Preference rows for tests: none, one and two images, facts and margins, of any length."""

from typing import Any

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from tests.families import image

FEATURES = Features(
    {
        "images": List(ImageFeature()),
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "chosen": List({"role": Value("string"), "content": Value("string")}),
        "rejected": List({"role": Value("string"), "content": Value("string")}),
        "facts": List(Value("string")),
        "margin": Value("float64"),
    }
)


def preference_row(seed: int, images: int = 1, **changes: Any) -> dict[str, Any]:
    """A row whose content depends on `seed`; `changes` replace columns."""
    words = ["cat", "dog", "tree", "wall", "circle", "square", "picture"]
    row = {
        "images": [image(10 * seed + place, 56 + 8 * (seed % 3), 40 + 8 * place) for place in range(images)],
        "prompt": [{"role": "user", "content": "What is in the image?"}],
        "chosen": [{"role": "assistant", "content": f"A {words[seed % 7]} and a {words[(seed + 2) % 7]}."}],
        "rejected": [{"role": "assistant", "content": f"There is a {words[(seed + 3) % 7]}, I think, on the left."}],
        "facts": [f"a red {words[seed % 7]}", f"a blue {words[(seed + 2) % 7]}", "a white wall"],
        "margin": 0.0,
    }
    return row | changes


def preference_rows(images: list[int] | None = None, **changes: Any) -> Dataset:
    """One row for each number in `images`, by default 1, 0, 2 and 1; `changes` replace columns in all."""
    images = [1, 0, 2, 1] if images is None else images
    rows = [preference_row(seed, count, **changes) for seed, count in enumerate(images)]
    return Dataset.from_list(rows, features=FEATURES)
