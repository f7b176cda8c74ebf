"""LLaVA-Human-Preference-10K (`zhiqings/LLaVA-Human-Preference-10K`, Apache-2.0, images COCO train2017).

Two replies of one model, compared by people who looked for hallucinations first. The facts are in a second file,
`image_to_caption.json` of `zhiqings/LLaVA-RLHF-Data`, joined by image. One record and one entry of that file, their
content invented:

    {"id": "000000111111", "image": "000000111111.jpg", "hallucination": True, "preference": 2,
     "conversations": [{"from": "human", "value": "<image>\\nWhat is on the bench?"},
                       {"from": "gpt", "value": "replaced by the candidates"}],
     "output_1": {"from": "gpt", "value": "A cat in a hat."}, "output_2": {"from": "gpt", "value": "A grey cat."}}

    {"000000111111.jpg": ["A grey cat sleeps on a bench.", "A cat outside."]}
"""

from collections.abc import Mapping, Sequence

from datasets import List, Value

from trl_vlm.data.converters.records import (
    PREFERENCE_COLUMNS,
    BadRecord,
    Record,
    Row,
    joined_facts,
    need,
    preference_row,
    prompt_and_last_reply,
    turns,
)

COLUMNS = {
    **PREFERENCE_COLUMNS,
    "facts": List(Value("string")),
    "hallucination": Value("bool"),
    "id": Value("string"),
}


def to_row(record: Record, facts: Mapping[str, Sequence[str]] | None = None) -> Row:
    """One preference row; all turns but the last are the prompt, `hallucination` is kept.

    Args:
        record: One record.
        facts: The contents of `image_to_caption.json`. Without it the row has no column `facts`.
    """
    need(record, ["image", "conversations", "output_1", "output_2", "preference"])
    prompt, _ = prompt_and_last_reply(last_reply_filled_in(record["conversations"]))
    preference = str(record["preference"])
    if preference not in {"1", "2"}:
        raise BadRecord("preference is neither 1 nor 2", f"got {record['preference']!r}")
    outputs = {number: reply_of(record[f"output_{number}"], f"output_{number}") for number in ("1", "2")}
    row = preference_row(
        record["image"],
        prompt,
        outputs[preference],
        outputs["2" if preference == "1" else "1"],
        hallucination=bool(record.get("hallucination", False)),
        id=str(record.get("id", "")),
    )
    if facts is not None:
        row["facts"] = joined_facts(facts, record["image"])
    return row


def last_reply_filled_in(conversation: object) -> list[dict[str, str]]:
    """The conversation as messages; its last reply is a stand-in for the candidates, so it may be empty."""
    if isinstance(conversation, Sequence) and conversation and isinstance(conversation[-1], Mapping):
        conversation = [*conversation[:-1], {**conversation[-1], "value": "stand-in"}]
    return turns(conversation)


def reply_of(output: object, what: str) -> object:
    """The text of `{"from": "gpt", "value": text}`, or of a plain string."""
    if isinstance(output, Mapping):
        if "value" not in output:
            raise BadRecord(f"{what} has no value", f"it holds {sorted(map(str, output))}")
        return output["value"]
    return output
