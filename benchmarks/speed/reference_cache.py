"""Starting with a reference cache: the time per row until training can begin, without the reference model itself.

python benchmarks/speed/reference_cache.py --rows 1000 20000
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset, load_from_disk
from PIL import Image

from trl_vlm.data.images import load_image
from trl_vlm.data.named_rows import named_rows
from trl_vlm.trainers.dpo.reference_cache import ReferenceCache, dataset_keys

IMAGES = 64  # different ones
REPLY_TOKENS = 64


def jpeg(number: int) -> bytes:
    """A photo-like JPEG of 640x480 pixels."""
    buffer = io.BytesIO()
    Image.effect_noise((640, 480), 5 + number).convert("RGB").save(buffer, format="JPEG", quality=60)
    return buffer.getvalue()


def rows(count: int, folder: Path) -> Dataset:
    """Preference rows on disk; images undecoded."""
    images = [jpeg(number) for number in range(IMAGES)]
    records = (
        {
            "images": [{"bytes": images[number % IMAGES], "path": None}],
            "prompt": [{"role": "user", "content": f"What is in image {number}?"}],
            "chosen": [{"role": "assistant", "content": f"A grey cat, {number}."}],
            "rejected": [{"role": "assistant", "content": f"A dog in a hat, {number}."}],
        }
        for number in range(count)
    )
    Dataset.from_list(list(records)).save_to_disk(folder)
    return load_from_disk(folder)


def milliseconds(work, count: int) -> float:
    """Per row."""
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start) / count


def measure(count: int, accelerator: Accelerator) -> dict[str, float]:
    """Milliseconds per row: hashing all keys, a second start, and for comparison the decoding of images."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = named_rows(rows(count, Path(folder, "rows")), "train")
        cache = ReferenceCache(Path(folder, "cache"), {"model": "m"})
        result = {"rows": count, "first start": milliseconds(lambda: fill(cache, dataset, accelerator), count)}
        again = ReferenceCache(cache.folder, {"model": "m"})
        result["second start"] = milliseconds(lambda: start_again(again, dataset, accelerator), count)
        some = min(count, 500)
        sample = [dataset[row]["images"][0] for row in range(some)]
        decoding = milliseconds(lambda: [load_image(image, name="row") for image in sample], some)
        return result | {"decoding, for comparison": decoding}


def fill(cache: ReferenceCache, dataset, accelerator: Accelerator) -> None:
    """Keys of all rows, and log-probabilities of the size of real ones."""
    keys = [key for row in dataset_keys(cache, dataset, "train", accelerator) for key in row]
    for start in range(0, len(keys), 1024):
        cache.write({key: torch.zeros(REPLY_TOKENS) for key in keys[start : start + 1024]})
    cache.finish("train", keys)


def start_again(cache: ReferenceCache, dataset, accelerator: Accelerator) -> None:
    """What a start with a full cache does."""
    cache.read()
    keys = dataset_keys(cache, dataset, "train", accelerator)
    cache.check_data("train", (key for row in keys for key in row))
    assert all(key in cache.log_probs for row in keys for key in row)
    cache.read()


def main() -> None:
    """Measures, and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 20000])
    options = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    print(json.dumps([measure(count, accelerator) for count in options.rows], indent=1))


if __name__ == "__main__":
    main()
