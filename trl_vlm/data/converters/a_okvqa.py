"""A-OKVQA (arXiv:2206.01718, Apache-2.0, images COCO 2017) -> supervised rows with letters, and facts.

Read: `HuggingFaceM4/A-OKVQA`, which holds the images, or `aokvqa_v1p0_train.json`, which names them by `image_id`. One
record, its content invented:

    {"image_id": 42, "question_id": "2x7", "question": "What runs on rails?",
     "choices": ["bus", "tram", "boat", "car"], "correct_choice_idx": 1, "direct_answers": ["tram", "train"],
     "difficult_direct_answer": false, "rationales": ["Trams run on rails.", "The rails are for a tram.", "A tram."]}

Source: the published files; the test split has neither answers nor rationales.
"""

from datasets import List, Value

from trl_vlm.data.converters.dialogues import SUPERVISED_COLUMNS
from trl_vlm.data.converters.nlf import image_name
from trl_vlm.data.converters.records import (
    BadRecord,
    Record,
    Row,
    assistant_turn,
    clean_reply,
    clean_text,
    list_of_texts,
    need,
    prompt_row,
    question_text,
    user_turn,
)

COLUMNS = {
    **{name: SUPERVISED_COLUMNS[name] for name in ("images", "prompt", "completion")},
    "facts": List(Value("string")),
    "answer": Value("string"),
    "id": Value("string"),
}

ANSWERS = ("letter", "rationale")
LETTERS = "ABCDEFGH"
REQUESTS = {
    "letter": "Choose the right option and begin with its letter.",
    "rationale": "Give the reason first, and then the letter of the right option.",
}


def to_row(record: Record, *, reply: str = "letter") -> Row:
    """One supervised row; the rationales are its `facts`, and `answer` is the letter, for the rewards of PPO.

    Args:
        record: One record.
        reply: "letter": the reply is the letter and the text of the right option. "rationale": it is the first
            rationale and then the letter, a chain of thought.
    """
    if reply not in ANSWERS:
        raise ValueError(f"`reply` is {reply!r}; it must be one of {', '.join(ANSWERS)}.")
    need(record, ["question", "choices", "correct_choice_idx", "rationales"])
    has_image = record.get("image") is not None
    need(record, ["image" if has_image else "image_id"])
    choices = list_of_texts(record["choices"], "choice")
    if not 2 <= len(choices) <= len(LETTERS):
        raise BadRecord("another number of choices", f"{len(choices)}; 2 to {len(LETTERS)} have letters")
    right = _right_choice(record["correct_choice_idx"], len(choices))
    rationales = list_of_texts(record["rationales"], "rationale")
    options = "\n".join(f"{LETTERS[place]}. {choice}" for place, choice in enumerate(choices))
    text = f"{LETTERS[right]}. {choices[right]}"
    if reply == "rationale":
        if not rationales:
            raise BadRecord("no rationale")
        text = f"{_sentence(rationales[0])} The answer is {LETTERS[right]}."
    return prompt_row(
        record["image"] if has_image else image_name(record["image_id"]),
        user_turn(f"{question_text(record['question'])}\n{options}\n{REQUESTS[reply]}"),
        completion=assistant_turn(clean_reply(text)),
        facts=rationales,
        answer=LETTERS[right],
        id=str(record.get("question_id", "")),
    )


def _right_choice(place: object, choices: int) -> int:
    if place is None:
        raise BadRecord("no right choice", "the test split is published without")
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < choices:
        raise BadRecord("correct_choice_idx names no choice", f"got {str(place)[:60]!r} of {choices}")
    return place


def _sentence(text: str) -> str:
    """The text with a full stop at its end."""
    text = clean_text(text, "rationale")
    return text if text[-1] in ".!?" else f"{text}."
