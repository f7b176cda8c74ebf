"""The preference data of mDPO (`fwnlp/mDPO-preference-data`, arXiv:2406.11839) -> preference rows.

10,000 pairs of VLFeedback, `vlfeedback_llava_10k.json`. The prompt is a whole one of Vicuna's format. One record, its
content invented:

    {"img_path": "images/svit-1.jpg", "chosen": "Red.", "rejected": "It is a blue bus.",
     "prompt": "A chat between ... and an assistant. USER: <image>\\nWhat color is the bus? ASSISTANT:"}

Source: `data/sample_data.json` of luka-group/mDPO, which its training script reads in the same way.
"""

import re

from trl_vlm.data.converters.records import (
    PREFERENCE_COLUMNS,
    BadRecord,
    Record,
    Row,
    clean_text,
    need,
    preference_row,
    question_text,
    user_turn,
)

COLUMNS = PREFERENCE_COLUMNS

SPEAKERS = re.compile(r"\b(?:USER|ASSISTANT):")


def to_row(record: Record) -> Row:
    """One preference row; the question alone is the prompt, as each model has a template of its own."""
    need(record, ["img_path", "prompt", "chosen", "rejected"])
    return preference_row(
        record["img_path"], user_turn(question_of(record["prompt"])), record["chosen"], record["rejected"]
    )


def question_of(prompt: object) -> str:
    """The question between USER: and ASSISTANT:, or the whole text where there is neither."""
    text = clean_text(prompt, "prompt")
    speakers = SPEAKERS.findall(text)
    if not speakers:
        return question_text(text)
    if speakers != ["USER:", "ASSISTANT:"] or not text.endswith("ASSISTANT:"):
        raise BadRecord("prompt is not one question", f"its speakers are {speakers}")
    return question_text(SPEAKERS.split(text)[1])
