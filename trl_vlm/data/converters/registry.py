"""The public datasets that can be converted, by the name of their converter."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_vlm.data.converters import (
    a_okvqa,
    annotations,
    coco_captions,
    coco_objects,
    fact_rlhf,
    flickr30k_entities,
    hadpo,
    hsa_dpo,
    llava_conversations,
    llava_human_preference,
    mdpo,
    mmpr,
    multimodal_rewardbench,
    nlf,
    povid,
    rlaif_v,
    rlhf_v,
    vl_rewardbench,
    vlfeedback,
    vqav2,
)
from trl_vlm.data.converters.dialogues import PARTS
from trl_vlm.data.converters.records import Converted, Record, Row


@dataclass(frozen=True)
class Converter:
    """One public dataset.

    Args:
        function: `to_row(record, **options)`, or `to_rows` where one record makes several rows.
        columns: Name to `datasets` feature of all the columns that its rows may have.
        hub_id: Where it is published; of a dataset with a reader of its own, the folder that it is unpacked to.
        reader: Reads the records of a folder, where these are not the lines of its files.
        needs_images: Whether rows are only made of images that are there.
    """

    function: Callable[..., Row | Converted]
    columns: Mapping[str, Any]
    hub_id: str
    reader: Callable[[Path], Iterator[Record]] | None = None
    needs_images: bool = True

    @property
    def options(self) -> list[str]:
        """The names of the function's options."""
        return list(inspect.signature(self.function).parameters)[1:]

    def features(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Name to `datasets` feature of the columns, as the options of a conversion make them."""
        if options.get("image_places") != "parts":
            return self.columns
        return {
            **self.columns,
            **{name: PARTS for name in ("prompt", "completion", "messages") if name in self.columns},
        }

    def __call__(self, record: Record, **options: Any) -> Converted:
        """The rows of one record."""
        made = self.function(record, **options)
        return made if isinstance(made, Converted) else Converted([made])


CONVERTERS = {
    "rlhf-v": Converter(rlhf_v.to_row, rlhf_v.COLUMNS, "openbmb/RLHF-V-Dataset"),
    "rlaif-v": Converter(rlaif_v.to_row, rlaif_v.COLUMNS, "openbmb/RLAIF-V-Dataset"),
    "vlfeedback": Converter(vlfeedback.to_rows, vlfeedback.COLUMNS, "MMInstruction/VLFeedback"),
    "povid": Converter(povid.to_row, povid.COLUMNS, "YiyangAiLab/POVID_preference_data_for_VLLMs"),
    "llava-human-preference": Converter(
        llava_human_preference.to_row, llava_human_preference.COLUMNS, "zhiqings/LLaVA-Human-Preference-10K"
    ),
    "nlf": Converter(nlf.to_row, nlf.COLUMNS, "YangyiYY/LVLM_NLF"),
    "mmpr": Converter(mmpr.to_rows, mmpr.COLUMNS, "OpenGVLab/MMPR-v1.1"),
    "hsa-dpo": Converter(hsa_dpo.to_row, hsa_dpo.COLUMNS, "WenyiXiao/HSA-DPO"),
    "hadpo": Converter(hadpo.to_rows, hadpo.COLUMNS, "hadpo/llava-v1.5", hadpo.records),
    "mdpo": Converter(mdpo.to_row, mdpo.COLUMNS, "fwnlp/mDPO-preference-data"),
    "fact-rlhf": Converter(fact_rlhf.to_row, fact_rlhf.COLUMNS, "zhiqings/LLaVA-RLHF-Data"),
    "llava-conversations": Converter(
        llava_conversations.to_rows, llava_conversations.COLUMNS, "liuhaotian/LLaVA-Instruct-150K"
    ),
    "vqav2": Converter(vqav2.to_rows, vqav2.COLUMNS, "vqav2", vqav2.records),
    "a-okvqa": Converter(a_okvqa.to_row, a_okvqa.COLUMNS, "HuggingFaceM4/A-OKVQA"),
    "flickr30k-entities": Converter(
        flickr30k_entities.to_rows, flickr30k_entities.COLUMNS, "flickr30k_entities", flickr30k_entities.records
    ),
    "vl-rewardbench": Converter(vl_rewardbench.to_row, vl_rewardbench.COLUMNS, "MMInstruction/VL-RewardBench"),
    "multimodal-rewardbench": Converter(
        multimodal_rewardbench.to_row, multimodal_rewardbench.COLUMNS, "data/all_data.json"
    ),
    "annotations": Converter(annotations.to_rows, annotations.COLUMNS, "annotations.jsonl"),
    "coco-objects": Converter(
        coco_objects.to_row, coco_objects.COLUMNS, "annotations", coco_objects.records, needs_images=False
    ),
    "coco-captions": Converter(
        coco_captions.to_row, coco_captions.COLUMNS, "annotations", coco_captions.records, needs_images=False
    ),
}


def checked_converter(name: str, options: Mapping[str, Any], facts: str | Path | None) -> Converter:
    """The converter called `name`; raises `ValueError` for an unknown one, and for options that it does not have."""
    if name not in CONVERTERS:
        raise ValueError(f"There is no converter {name!r}. There are: {', '.join(CONVERTERS)}.")
    converter = CONVERTERS[name]
    unknown = sorted(set(options) - set(converter.options))
    if facts is not None and "facts" not in converter.options:
        unknown.append("facts")
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}. It has: {', '.join(converter.options) or 'none'}."
        )
    return converter
