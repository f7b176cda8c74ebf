"""Records of benchmarks from questions and scripted replies and answers; data folders in the published schemas."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trl_vlm.evaluation.benchmark import Benchmark, Question, Record


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_image(path: Path, color: str = "red", size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def record(
    question: Question, reply: str, answer: str | None = None, is_finished: bool | None = True, prompt: str = ""
) -> Record:
    return Record(
        question.id,
        question.group,
        prompt or question.text,
        reply,
        question.truth,
        is_finished,
        answer,
        "" if answer is not None else "no answer",
        question.tables,
    )


def metrics_of(
    benchmark: Benchmark, data: Path, replies: Sequence[str], answers: Sequence[str | None] | None = None
) -> dict[str, float]:
    questions = benchmark.read(data)
    answers = [None] * len(replies) if answers is None else answers
    records = [record(*row) for row in zip(questions, replies, answers, strict=True)]
    return benchmark.score(records).metrics


def pope_folder(data: Path, images: int = 2) -> Path:
    """Two questions about each image and split, yes and no."""
    for split in ("random", "popular", "adversarial"):
        records = []
        for image in range(images):
            name = f"COCO_val2014_{image:012}.jpg"
            write_image(data / "val2014" / name, size=(40 + 8 * image, 30))
            for text, label in (("Is there a dog in the image?", "yes"), ("Is there a cat in the image?", "no")):
                records.append({"question_id": len(records) + 1, "image": name, "text": text, "label": label})
        write_lines(data / "pope" / f"coco_pope_{split}.json", records)
    return data


def objects_folder(data: Path) -> Path:
    """Two images of COCO with their objects and captions, as the converter writes them."""
    rows = []
    for number, objects, captions in (
        (7, ["dog"], ["A puppy lies there."] * 5),
        (9, ["traffic light", "person"], ["A man waits.", "A car passes."]),
    ):
        name = f"COCO_val2014_{number:012}.jpg"
        write_image(data / "val2014" / name)
        rows.append({"images": [name], "objects": objects, "facts": captions, "image_id": number})
    write_lines(data / "coco_objects.jsonl", rows)
    return data


def mmhal_folder(data: Path, items: int = 8) -> Path:
    types = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
    records = []
    for number in range(items):
        write_image(data / "mmhal" / "images" / f"{number}_o.jpg")
        records.append(
            {
                "question_type": types[number % 8],
                "question_topic": "animal",
                "image_id": f"id{number}",
                "image_src": f"https://farm.staticflickr.com/1/{number}_o.jpg",
                "image_content": ["Dog", "Ball"],
                "question": f"What is it? ({number})",
                "gt_answer": "A dog.",
                "model_answer": "",
            }
        )
    write_json(data / "mmhal" / "response_template.json", records)
    return data
