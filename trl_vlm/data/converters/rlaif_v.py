"""RLAIF-V (`openbmb/RLAIF-V-Dataset`, CC-BY-NC-4.0) -> preference rows. One record, its content invented:

{"ds_name": "RLAIF-V", "image": {"bytes": b"...", "path": "7.jpg"}, "question": "What is on the table?",
 "chosen": "A red cup.", "rejected": "Two dogs.", "origin_dataset": "coco", "origin_split": "{...}",
 "idx": "7", "image_path": "coco/7.jpg"}
"""

from datasets import Value

from trl_vlm.data.converters.records import (
    PREFERENCE_COLUMNS,
    Record,
    Row,
    need,
    preference_row,
    question_text,
    user_turn,
)

COLUMNS = {
    **PREFERENCE_COLUMNS,
    "idx": Value("string"),
    "ds_name": Value("string"),
    "origin_split": Value("string"),
}


def to_row(record: Record) -> Row:
    """One preference row; `idx`, `ds_name` and `origin_split` are kept."""
    need(
        record,
        ["image", "question", "chosen", "rejected"],
        "`HuggingFaceH4/rlaif-v_formatted` needs no conversion: its columns are TRL's.",
    )
    return preference_row(
        record["image"],
        user_turn(question_text(record["question"])),
        record["chosen"],
        record["rejected"],
        **{column: str(record.get(column, "")) for column in ("idx", "ds_name", "origin_split")},
    )
