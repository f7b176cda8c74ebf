"""VQA-v2 (visualqa.org, CC-BY-4.0, images COCO 2014) -> supervised rows with short answers, and their gold answers.

A folder holds the files of questions and of annotations, as the two archives of a split have them. One entry of
`v2_OpenEnded_mscoco_train2014_questions.json` (in `questions`, beside `data_subtype`) and one of
`v2_mscoco_train2014_annotations.json` (in `annotations`), their content invented:

    {"question_id": 42000, "image_id": 42, "question": "Is the cat asleep?"}

    {"question_id": 42000, "image_id": 42, "question_type": "is the", "answer_type": "yes/no",
     "multiple_choice_answer": "yes", "answers": [{"answer": "yes", "answer_confidence": "yes", "answer_id": 1}]}

Source: the format as visualqa.org documents it. The questions of one image make one record.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Value

from trl_vlm.data.converters.dialogues import SUPERVISED_COLUMNS, TURNS, supervised_rows
from trl_vlm.data.converters.records import (
    BadRecord,
    Converted,
    Record,
    Row,
    assistant_turn,
    clean_reply,
    drawn_one,
    need,
    question_text,
    read_json,
    user_turn,
)

COLUMNS = {**SUPERVISED_COLUMNS, "answer": Value("string"), "id": Value("string")}

ALONE = "alone"
ANSWER_TYPES = ("yes/no", "number", "other")
IMAGE_NAMES = ("2014", "2017")
SHORT_ANSWER = (
    "{} Answer briefly.",
    "{}\nReply with a single word or a short phrase.",
    "Look at the picture and answer in a few words: {}",
    "Question: {} Short answer:",
)


def records(folder: Path) -> Iterator[Record]:
    """The images of all splits in a folder, with their questions and answers.

    Raises:
        ValueError: There are no questions or no annotations, or they have another form.
    """
    files = sorted(folder.glob("*questions*.json")) if folder.is_dir() else []
    annotations = sorted(folder.glob("*annotations*.json")) if folder.is_dir() else []
    if not files or not annotations:
        raise ValueError(
            f"There are no *questions*.json and *annotations*.json in {str(folder)!r}. Unpack both archives of a "
            "split of visualqa.org into it."
        )
    try:
        answers = {answer["question_id"]: answer for file in annotations for answer in _list(file, "annotations")}
        for file in files:
            by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for question in _list(file, "questions"):
                by_image[question["image_id"]].append({**question, **answers.get(question["question_id"], {})})
            split = read_json(file).get("data_subtype", "train2014")
            yield from ({"image_id": name, "split": split, "questions": by_image[name]} for name in sorted(by_image))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"An entry in {str(folder)!r} has another form than the published ones ({error}).") from error


def to_rows(
    record: Record,
    *,
    answer_types: Sequence[str] = ANSWER_TYPES,
    turns: str = ALONE,
    max_turns: int | None = None,
    image_names: str = "2014",
) -> Converted:
    """The supervised rows of one image; `answer` is the gold answer, for the rewards of PPO.

    Args:
        record: One image with its questions.
        answer_types: The published types that are taken: "yes/no", "number", "other".
        turns: "alone": each question with its answer, in one of four wordings that ask for a short answer, drawn by
            the question. The others make one dialogue of an image's questions, which asks for short answers once:
            "each" a row of every answer after those before it, "last" the last, "all" one row of `messages`.
        max_turns: How many questions of an image are taken, from the first on.
        image_names: How the images are called: "2014", or "2017" as COCO renamed them.
    """
    _check_options(answer_types, turns, image_names)
    need(record, ["image_id", "split", "questions"])
    dropped: Counter[str] = Counter()
    kept = [question for question in record["questions"] if _is_taken(question, answer_types, dropped)][:max_turns]
    images: list[object] = [_image_name(record["image_id"], str(record["split"]), image_names)]
    if turns == ALONE:
        return Converted([_alone(images, question) for question in kept], dropped)
    if not kept:
        return Converted([], dropped)
    messages = [message for place, question in enumerate(kept) for message in _exchange(question, is_first=place == 0)]
    rows = supervised_rows(images, messages, turns=turns, id=str(record["image_id"]))
    if turns != "all":
        rows = [{**row, "answer": row["completion"][0]["content"]} for row in rows]
    return Converted(rows, dropped)


def _check_options(answer_types: Sequence[str], turns: str, image_names: str) -> None:
    unknown = set(answer_types) - set(ANSWER_TYPES)
    if unknown or not answer_types:
        raise ValueError(f"`answer_types` is {list(answer_types)}; choose one or more of {', '.join(ANSWER_TYPES)}.")
    if turns not in (ALONE, *TURNS):
        raise ValueError(f"`turns` is {turns!r}; it must be one of {', '.join((ALONE, *TURNS))}.")
    if image_names not in IMAGE_NAMES:
        raise ValueError(f"`image_names` is {image_names!r}; it must be one of {', '.join(IMAGE_NAMES)}.")


def _is_taken(question: Record, answer_types: Sequence[str], dropped: Counter[str]) -> bool:
    if "multiple_choice_answer" not in question:
        dropped["question without annotation"] += 1
        return False
    need(question, ["question_id", "question", "answer_type"])
    if question["answer_type"] not in answer_types:
        dropped["answer of another type"] += 1
        return False
    return True


def _alone(images: list[object], question: Record) -> Row:
    name = str(question["question_id"])
    text = drawn_one(SHORT_ANSWER, name).format(question_text(question["question"]))
    answer = clean_reply(question["multiple_choice_answer"], "answer")
    row = {"images": list(images), "prompt": user_turn(text), "completion": assistant_turn(answer)}
    return {**row, "id": name, "answer": answer}


def _exchange(question: Record, *, is_first: bool) -> list[dict[str, Any]]:
    text = question_text(question["question"])
    asked = drawn_one(SHORT_ANSWER, str(question["question_id"])).format(text) if is_first else text
    return user_turn(asked) + assistant_turn(clean_reply(question["multiple_choice_answer"], "answer"))


def _image_name(image_id: object, split: str, image_names: str) -> str:
    if isinstance(image_id, bool) or not isinstance(image_id, int) or image_id < 0:
        raise BadRecord("image_id is not a number", f"got {str(image_id)[:60]!r}")
    return f"{image_id:012d}.jpg" if image_names == "2017" else f"COCO_{split}_{image_id:012d}.jpg"


def _list(file: Path, key: str) -> list[dict[str, Any]]:
    data = read_json(file)
    if not isinstance(data, dict) or not isinstance(data.get(key), list):
        raise ValueError(f"{str(file)!r} has no list {key!r}; it must be a file as visualqa.org publishes it.")
    return data[key]
