"""What examples and studies share: finished folders, loading, evaluation of captions and answers."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForImageTextToText
from trl import ModelConfig, get_quantization_config

from trl_vlm.data.io.atomic import write_whole
from trl_vlm.evaluation import check_scorable_rows, generate_replies, score_rows
from trl_vlm.models import last_complete_checkpoint, load_processor

DONE = "done.json"


def is_done(folder: Path) -> bool:
    """Whether a run in this folder has ended."""
    return (folder / DONE).exists()


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all: a killed run leaves no half file."""
    write_whole(path, json.dumps(value, indent=2))


def history(folder: str | Path) -> list[dict[str, Any]]:
    """The trainer's log of a folder that `train` made."""
    path = Path(folder, "history.json")
    return json.loads(path.read_text()) if path.exists() else []


def train(trainer: Any, folder: Path) -> None:
    """Train from the last complete checkpoint, save, and mark the folder as done."""
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        write_json(folder / "history.json", trainer.state.log_history)
        write_json(folder / DONE, {"steps": trainer.state.global_step})
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()


def load_model(folder: str | Path, **options: Any) -> tuple[Any, Any]:
    """The model of a folder, for evaluation, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), load_processor(folder)


def load_options(model: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`: precision, attention, quantisation."""
    given = {
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "quantization_config": get_quantization_config(model),
    }
    return {name: value for name, value in given.items() if value is not None}


def load_rows(path: str | None, option: str) -> Dataset:
    """Rows of a .jsonl, .json or .parquet file, or of a hub dataset."""
    if path is None:
        raise SystemExit(f"`--{option}` is needed with `--model_name_or_path`: a file or a hub dataset.")
    suffix = Path(path).suffix.removeprefix(".")
    kind = {"jsonl": "json", "json": "json", "parquet": "parquet"}.get(suffix)
    return load_dataset(kind, data_files=path, split="train") if kind else load_dataset(path, split="train")


def evaluate_rows(folder: str | Path, rows: Dataset, max_new_tokens: int) -> dict[str, dict[str, float]]:
    """CHAIR of replies to rows with `objects`, POPE of replies to rows with `answer`."""
    model, processor = load_model(folder, dtype="auto")
    check_scorable_rows(rows)
    replies = generate_replies(model, processor, rows, max_new_tokens=max_new_tokens)
    return {"evaluation": score_rows(rows, replies)}


def by_split(results: dict[str, float]) -> dict[str, dict[str, float]]:
    """From `adv/greedy/recall` to {"adv, greedy": {"recall": ...}}; the questions belong to both styles of a split."""
    splits: dict[str, dict[str, float]] = {}
    for name, value in results.items():
        split, part, metric = name.split("/")
        if part in ("greedy", "sampled"):
            splits.setdefault(f"{split}, {part}", {})[metric] = value
        else:
            for style in ("greedy", "sampled"):
                splits.setdefault(f"{split}, {style}", {})[f"{part}_{metric}"] = value
    return splits
