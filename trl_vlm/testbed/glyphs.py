"""Shapes that a small vision tower can tell apart."""

import numpy as np

_MAX_TRIES = 100_000


def distinct_bitmaps(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Mirror-symmetric 5 x 5 bitmaps of 11 to 17 pixels, any two at least 8 pixels apart."""
    bitmaps: list[np.ndarray] = []
    for _ in range(_MAX_TRIES):
        half = rng.random((5, 3)) < 0.55
        bitmap = np.concatenate([half, half[:, 1::-1]], axis=1)
        if 11 <= bitmap.sum() <= 17 and all((bitmap != other).sum() >= 8 for other in bitmaps):
            bitmaps.append(bitmap)
            if len(bitmaps) == count:
                return bitmaps
    raise ValueError(f"No {count} distinct glyphs found (got {len(bitmaps)}); use fewer kinds.")
