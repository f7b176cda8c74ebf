"""MMPR (`OpenGVLab/MMPR`, `-v1.1`, `-v1.2`, arXiv:2411.10442, MIT) -> preference rows: InternVL's MPO.

Its `annotations.zip` holds a file of JSON Lines for each part, and `meta.json` names the folder of each part's
images. One record, its content invented:

    {"image": "coco/train2017/000000444444.jpg", "question": "<image>\\nHow many people are in the picture?",
     "chosen": "Two people.", "rejected": "Two people and a dog."}

Source: the features on the dataset's card. Parts with several images have a list in `image`, and `<image>` for each.
"""

from trl_vlm.data.converters.dialogues import dialogue, images_of
from trl_vlm.data.converters.records import PREFERENCE_COLUMNS, Converted, Record, need, preference_row_of

COLUMNS = PREFERENCE_COLUMNS


def to_rows(record: Record, *, image_places: str = "start") -> Converted:
    """One preference row; a record without image is a row without image.

    Args:
        record: One record.
        image_places: "start": images go before the question, whose content is text. "parts": the content is a list of
            parts, images where they are mentioned.
    """
    need(record, ["question", "chosen", "rejected"])
    images = images_of(record)
    prompt = dialogue([{"role": "user", "content": record["question"]}], len(images), image_places, "question")
    return Converted([preference_row_of(images, prompt, record["chosen"], record["rejected"])])
