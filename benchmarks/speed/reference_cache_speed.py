"""What a start with a reference cache costs per row, whatever the size of the images.

    python -m benchmarks.speed.reference_cache_speed --rows 1000 20000 --output docs/results/reference_cache.json

CPU seconds of one process and one thread, without the reference model's own passes: shards of log-probabilities of the
size of real ones are written in their place. Three figures:

* the first start: images, prompts and replies hashed, shards written;
* a second start, when the cache is full: everything that `reference_cache` adds (`limit_ms` a row at most);
* the whole constructor of `DPOTrainer` on that second start, and without a cache: the check of all rows, which is done
  anyway, is in both.

Rows have one image each, stored in the row or in a file. There are `--images` different ones, so that 20,000 rows of
12 megapixels fit a disk; each row is hashed by itself nevertheless.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets import Image as ImageFeature
from PIL import Image

from benchmarks.speed.dpo_speed import processor, save_model
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.data.images import load_image
from trl_vlm.trainers.dpo.reference_cache import MANIFEST, ReferenceCache, dataset_keys, fill

LIMIT_MS = 0.2
REPLY_TOKENS = 64
SIZES = {"640x480": (640, 480), "12 megapixels": (4000, 3000)}
# Size of the images, and whether rows hold their bytes or the path of a file.
CASES = [("640x480", "in the row"), ("640x480", "file"), ("12 megapixels", "file")]


def jpeg(size: tuple[int, int], number: int) -> bytes:
    """A photo-like JPEG: smooth shapes and some noise."""
    random = np.random.RandomState(number)
    small = Image.fromarray(random.randint(0, 255, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    pixels = pixels + random.randint(-12, 13, pixels.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def stored_rows(count: int, images: list[dict[str, Any]], folder: Path) -> Dataset:
    """Preference rows on disk; paths stay paths, which `save_to_disk` would replace by the bytes."""

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    turns = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": List(ImageFeature()), "prompt": turns, "chosen": turns, "rejected": turns})

    def records():
        for number in range(count):
            yield {
                "images": [images[number % len(images)]],
                "prompt": message("user", f"w1 w2 w3 w{number}"),
                "chosen": message("assistant", f"w4 w5 w{number} " * 20),
                "rejected": message("assistant", f"w6 w7 w{number} " * 20),
            }

    made = Dataset.from_generator(records, features=features, cache_dir=str(folder / "made"))
    assert isinstance(made, Dataset)
    return made


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def trainer(data: Dataset, model: str, folder: Path, cache: Path | None) -> DPOTrainer:
    args = DPOConfig(
        str(folder / "out"),
        reference_cache=None if cache is None else str(cache),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None,
    )
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=processor("llava"))


def written(cache: ReferenceCache, dataset: Any, accelerator: Accelerator) -> None:
    """A first start: the keys of all rows, and shards."""
    keys = [key for row in dataset_keys(cache, dataset, "train", accelerator) for key in row]
    for start in range(0, len(keys), 1024):
        cache.write({key: torch.zeros(REPLY_TOKENS) for key in keys[start : start + 1024]})
    cache.finish("train", keys)


def computes(*_: Any) -> Any:
    raise AssertionError("a full cache computes nothing")


def started(folder: Path, identity: dict[str, str], dataset: Any, accelerator: Accelerator) -> None:
    """What `reference_cache` does on a start with a full cache."""
    cache = ReferenceCache(folder, identity)
    fill(cache, dataset, "train", collator=computes, score=computes, batch_size=1, accelerator=accelerator)
    assert len(cache.log_probs) == 2 * len(dataset)


def measure(count: int, size: str, place: str, options: argparse.Namespace, model: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        images: list[dict[str, Any]] = [{"bytes": jpeg(SIZES[size], n), "path": None} for n in range(options.images)]
        mebibytes = statistics.mean(len(image["bytes"]) for image in images) / 2**20
        decoding = statistics.median(seconds(lambda i=i: load_image(i, name="row")) for i in images[:5])
        if place == "file":
            for number, image in enumerate(images):
                path = folder / f"{number}.jpg"
                path.write_bytes(image["bytes"])
                images[number] = {"bytes": None, "path": str(path)}
        data = stored_rows(count, images, folder)
        cache_folder = folder / "cache"
        # The first row gives the cache its identity; the real first start would compute the others.
        made = trainer(data.select(range(1)), model, folder, cache_folder)
        identity = json.loads((cache_folder / MANIFEST).read_text())["identity"]
        dataset = trainer(data, model, folder, None).train_dataset
        first = seconds(lambda: written(ReferenceCache(cache_folder, identity), dataset, made.accelerator))
        second, whole, plain = [], [], []
        for _ in range(options.runs):
            second.append(seconds(lambda: started(cache_folder, identity, dataset, made.accelerator)))
            plain.append(seconds(lambda: trainer(data, model, folder, None)))
            whole.append(seconds(lambda: trainer(data, model, folder, cache_folder)))
        per_row = {"second_start": second, "trainer_with_cache": whole, "trainer_without": plain}
        return {
            "rows": count,
            "images": size,
            "stored": place,
            "mebibytes_per_image": mebibytes,
            "first_start_ms": 1000 * first / count,
            "decoding_ms": 1000 * decoding,
            **{f"{name}_ms": spread([1000 * value / count for value in values]) for name, values in per_row.items()},
        }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        "# Starting with a reference cache",
        "",
        "Milliseconds of CPU time per row until training can begin, without the reference model's own passes. "
        "Preference rows with one JPEG and two replies of 64 tokens; one process, one thread; median of "
        f'{options.runs} starts, with the least and the most. "Second start" is all that `reference_cache` adds per '
        f"row when the cache is full: at most {LIMIT_MS} is the aim. The constructor of `DPOTrainer` also loads the "
        "model, hashes its weights once, and checks every row, with a cache or without; the model is that of "
        f"`dpo_speed.py`. There are {options.images} different images, which rows share; every row is hashed by "
        f"itself. torch {torch.__version__}, {os.cpu_count()} cores. Written by "
        "`python -m benchmarks.speed.reference_cache_speed`, while other work shared the machine.",
        "",
        "| rows | images | MiB | stored | first start | **second start** | constructor, full cache "
        "| constructor, no cache | decoding one image, for comparison |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        spans = [
            f"{span['median']:.3f} ({span['least']:.3f} to {span['most']:.3f})"
            for span in (result[f"{name}_ms"] for name in ("second_start", "trainer_with_cache", "trainer_without"))
        ]
        lines.append(
            f"| {result['rows']:,} | {result['images']} | {result['mebibytes_per_image']:.2f} | {result['stored']} "
            f"| {result['first_start_ms']:.2f} | {' | '.join(spans)} | {result['decoding_ms']:.1f} |"
        )
    lines += [
        "",
        "Keys are made of the stored bytes, so nothing is decoded at a start. A second start reads the keys that the "
        "first one kept under the dataset's fingerprint, and no row. Several processes share out the rows of a first "
        "start.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 20000])
    parser.add_argument("--runs", type=int, default=5, help="starts with a full cache")
    parser.add_argument("--images", type=int, default=16, help="different images")
    parser.add_argument("--scratch", type=Path, help="folder for rows and caches; default: the system's")
    parser.add_argument("--output", type=Path, help="JSON file; the report goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as model:
        save_model("llava", model)
        results = [measure(count, *case, options, model) for case in CASES for count in options.rows]
    text = report(results, options)
    sys.stdout.write(text)
    if options.output is not None:
        options.output.write_text(json.dumps({"limit_ms": LIMIT_MS, "results": results}, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(text)
    slowest = max(result["second_start_ms"]["most"] for result in results)
    if slowest > LIMIT_MS:
        sys.exit(f"A second start takes up to {slowest:.3f} ms a row; the limit is {LIMIT_MS}.")


if __name__ == "__main__":
    main()
