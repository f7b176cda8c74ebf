"""HSA-DPO (`WenyiXiao/HSA-DPO`, arXiv:2404.14233) -> preference rows whose rejected replies weigh by severity.

The file is `hsa_dpo_preference_llava1dot5.jsonl`; the images, `<id>.jpg`, are in `hsa_dpo_imgs.tar.gz`. One record,
its content invented:

    {"id": 7, "question": "Describe the table.", "chosen": "A red cup.", "rejected": "A red cup and two forks.",
     "chosen_score": 1.0, "rejected_score": 2.5}

Source: the fields that the published training code reads (`train_dpo.py` of Mr-Loevan/HSA-DPO); the scores are 1 where
they are absent.
"""

import math

from datasets import Value

from trl_vlm.data.converters.records import (
    PREFERENCE_COLUMNS,
    BadRecord,
    Record,
    Row,
    need,
    preference_row,
    question_text,
    user_turn,
)

COLUMNS = {
    **PREFERENCE_COLUMNS,
    "rejected_score_weight": Value("float64"),
    "chosen_score": Value("float64"),
    "id": Value("string"),
}


def to_row(record: Record) -> Row:
    """One preference row for Dense DPO; `rejected_score_weight` is the severity of the rejected reply's errors.

    The published code leaves the chosen reply unweighted, and so does the row: `chosen_score` is kept, and not used.
    """
    need(record, ["id", "question", "chosen", "rejected"])
    name = record["id"]
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
        raise BadRecord("id names no image", f"got {str(name)[:60]!r}")
    return preference_row(
        record["image"] if record.get("image") is not None else f"{name}.jpg",
        user_turn(question_text(record["question"])),
        record["chosen"],
        record["rejected"],
        rejected_score_weight=score_of(record, "rejected_score"),
        chosen_score=score_of(record, "chosen_score"),
        id=str(name),
    )


def score_of(record: Record, name: str) -> float:
    """A score from 0 on, 1.0 where the record has none."""
    value = record.get(name)
    if value is None:
        return 1.0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise BadRecord(f"{name} is not a finite number from 0 on", f"got {str(value)[:60]!r}")
    return float(value)
