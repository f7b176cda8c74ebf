"""Files of a user's own, in both forms of rows, and short runs of the scripts on a tiny model."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List

from tests import families

KINDS = ("dog", "cat", "tree")


def turn(role: str, text: str, parts: bool, images: int = 0) -> dict[str, Any]:
    if not parts:
        return {"role": role, "content": text}
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def row(folder: Path, index: int, parts: bool) -> dict[str, Any]:
    """All columns that any script reads; the image is a path."""
    path = folder / f"{index}.png"
    if not path.exists():
        families.image(index, 30, 40).save(path)
    kind, other = KINDS[index % 3], KINDS[(index + 1) % 3]
    return {
        "images": [str(path)],
        "prompt": [turn("user", "What is in the image?", parts, images=1)],
        "completion": [turn("assistant", f"A {kind}.", parts)],
        "chosen": [turn("assistant", f"A {kind}.", parts)],
        "rejected": [turn("assistant", f"A {other}.", parts)],
        "facts": [f"There is a {kind}."],
        "objects": [kind],
        "answer": "yes" if index % 2 else "no",
    }


def rows(folder: Path, columns: tuple[str, ...], count: int = 8, parts: bool = False) -> list[dict[str, Any]]:
    made = [row(folder, index, parts) for index in range(count)]
    return [{name: value for name, value in each.items() if name in columns} for each in made]


def with_images(data: list[dict[str, Any]]) -> Dataset:
    """As a dataset whose images are embedded."""
    dataset = Dataset.from_list(data)
    return dataset.cast(Features({**dataset.features, "images": List(Image())}))


def write(folder: Path, form: str, columns: tuple[str, ...], *, parts: bool = False, count: int = 8) -> str:
    """The rows in one of the forms of data that `trl-vlm check` reads; returns where they are."""
    data = rows(folder, columns, count, parts)
    target = folder / f"rows_{form}_{parts}_{'-'.join(columns)}"
    if form == "jsonl":
        path = target.with_suffix(".jsonl")
        path.write_text("\n".join(map(json.dumps, data)))
    elif form == "json":
        path = target.with_suffix(".json")
        path.write_text(json.dumps(data))
    elif form == "parquet":
        path = target.with_suffix(".parquet")
        with_images(data).to_parquet(path)
    elif form == "saved":
        path = target
        DatasetDict({"train": with_images(data), "test": with_images(data[:2])}).save_to_disk(path)
    else:
        assert form == "folder"
        path = target
        path.mkdir(exist_ok=True)
        with_images(data).to_parquet(path / "train-00000-of-00001.parquet")
    return str(path)


def options(model: str | Path, data: str, output: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--dataset_name", data, "--output_dir", str(output)),
        *("--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--learning_rate", "1e-3"),
        *("--gradient_checkpointing", "False", "--report_to", "none", "--disable_tqdm", "True", "--save_steps", "1"),
        *more,
    ]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((output / "history.json").read_text()) if "loss" in entry]
