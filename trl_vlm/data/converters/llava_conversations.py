"""Any dataset in LLaVA's format -> supervised rows: LLaVA-Instruct, the mixes of Fact-RLHF, ShareGPT4V, LLaVA-NeXT.

Read: a file of records with `conversations`, and `image` (a name, a list of names, the image itself) or none. The
supervised mix of Fact-RLHF is `mix-llava-sft90k-vqav2_83k-okvqa_16k-flickr_23k.json` of `shengs/LLaVA-SFT-122K`, the
start of its policy `llava_reward10k-aokvqa5k.json` of `zhiqings/LLaVA-RLHF-Data`. One record, its content invented:

    {"id": "000000333333", "image": "000000333333.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat stands at the corner?"},
                       {"from": "gpt", "value": "A red bus."},
                       {"from": "human", "value": "Is anyone in it?"}, {"from": "gpt", "value": "No."}]}

Source: the fields are those that LLaVA's training code reads, a list of images those of LLaVA-NeXT-Interleave.
"""

from datasets import Value

from trl_vlm.data.converters.dialogues import SUPERVISED_COLUMNS, dialogue, images_of, supervised_rows
from trl_vlm.data.converters.records import Converted, Record, need

COLUMNS = {**SUPERVISED_COLUMNS, "id": Value("string")}


def to_rows(
    record: Record, *, turns: str = "each", max_turns: int | None = None, image_places: str = "start"
) -> Converted:
    """The supervised rows of one record; one without image is a row without image.

    Args:
        record: One record.
        turns: "each": a row of every reply after its history. "last": the last reply. "all": one row of `messages`.
        max_turns: How many replies are kept, from the first on.
        image_places: "start": images go before the first question, and contents are text. "parts": contents are
            lists of parts, images where they are mentioned.
    """
    need(record, ["conversations"])
    images = images_of(record)
    messages = dialogue(record["conversations"], len(images), image_places)
    return Converted(supervised_rows(images, messages, turns=turns, max_turns=max_turns, id=str(record.get("id", ""))))
