"""The rows of every converter train one step, as they come from the file."""

import json
import math

import pyarrow
import pyarrow.parquet as parquet
import pytest
from datasets import concatenate_datasets, load_dataset

from tests.data.converters.helpers import (
    FACTS,
    NLF_COLUMNS,
    a_okvqa,
    fact_rlhf,
    hsa_dpo,
    image_folder,
    llava_conversations,
    llava_preference,
    mdpo,
    mmpr,
    nlf,
    povid,
    rlaif_v,
    rlhf_v,
    vlfeedback,
    write_coco_captions,
    write_flickr,
    write_hadpo,
    write_vqav2,
)
from tests.families import saved
from trl_vlm import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl_vlm.data.converters import Source, convert

RECORDS = {
    "rlhf-v": [rlhf_v()],
    "rlaif-v": [rlaif_v()],
    "vlfeedback": [vlfeedback([("5", "5", "5"), ("1", "1", "1")])],
    "povid": [povid()],
    "llava-human-preference": [llava_preference()],
    "nlf": [nlf()],
    "fact-rlhf": [fact_rlhf()] * 4,
    "mmpr": [mmpr()],
    "hsa-dpo": [hsa_dpo()],
    "mdpo": [mdpo()],
    "llava-conversations": [llava_conversations()],
    "a-okvqa": [a_okvqa()],
}
WRITERS = {"hadpo": write_hadpo, "vqav2": write_vqav2, "flickr30k-entities": write_flickr}
SUPERVISED_DATA = ["llava-conversations", "vqav2", "a-okvqa", "flickr30k-entities"]
PREFERENCE_DATA = [name for name in (*RECORDS, "hadpo") if name not in ("fact-rlhf", *SUPERVISED_DATA)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every dataset, converted into a folder of its own."""
    world = tmp_path_factory.mktemp("world")
    coco = ["COCO_train2014_000000000009.jpg", "000000111111.jpg", "000000222222.jpg", "000000000042.jpg"]
    coco += ["000000333333.jpg", *(f"COCO_train2014_{name:012d}.jpg" for name in (9, 42))]
    image_folder(world / "images", "bus.png", "1.jpg", "2.jpg", "7.jpg", *coco)
    (world / "facts.json").write_text(json.dumps(FACTS))
    facts = {"facts": world / "facts.json"}
    options_of = {"nlf": NLF_COLUMNS, "llava-human-preference": facts, "fact-rlhf": facts}
    for name, records in RECORDS.items():
        parquet.write_table(pyarrow.Table.from_pylist(records), world / f"{name}.parquet")
        source = Source(str(world / f"{name}.parquet"))
        convert(name, source, world / name, images=world / "images", progress=False, **options_of.get(name, {}))
    for name, write in WRITERS.items():
        source = Source(str(write(world / f"{name}-folder")))
        convert(name, source, world / name, images=world / "images", skip_bad=True, progress=False)
    source = Source(str(write_coco_captions(world / "captions")))
    convert("coco-captions", source, world / "coco-captions", images=world / "images", skip_bad=True, progress=False)
    whole = Source(str(world / "llava-conversations.parquet"))
    convert("llava-conversations", whole, world / "whole", images=world / "images", turns="all", progress=False)
    return world


def converted(folder, name):
    return load_dataset(str(folder / name), split="train", cache_dir=str(folder / "cache"))


ONE_STEP = {
    "max_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def rows_of_all(folder):
    columns = ["images", "prompt", "chosen", "rejected"]
    return concatenate_datasets([converted(folder, name).select_columns(columns) for name in PREFERENCE_DATA])


def test_the_rows_of_all_preference_data_sets_train_a_reward_model_together(folder):
    rows = rows_of_all(folder)
    args = RewardConfig(str(folder / "out"), per_device_train_batch_size=len(rows), check_pixels=False, **ONE_STEP)
    assert len(rows) == len(PREFERENCE_DATA) + 2  # HA-DPO has three
    assert RewardTrainer(str(saved("llava")), args, train_dataset=rows).train().training_loss > 0


def test_rows_with_facts_train_a_reward_model_as_they_come(folder):
    rows = converted(folder, "llava-human-preference")
    args = RewardConfig(str(folder / "out"), check_pixels=False, **ONE_STEP)
    assert RewardTrainer(str(saved("llava")), args, train_dataset=rows).train().training_loss > 0


def test_the_rows_of_all_preference_data_sets_train_with_dense_dpo_together(folder):
    rows = rows_of_all(folder)
    args = DPOConfig(str(folder / "out"), per_device_train_batch_size=len(rows), dense_preset="paper", **ONE_STEP)
    trainer = DPOTrainer(str(saved("llava")), args=args, train_dataset=rows)
    # Policy and reference are still the same, so every pair pays ln 2.
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-5)


def test_the_prompts_of_fact_rlhf_train_with_ppo_and_their_columns_reach_the_reward(folder):
    seen = []

    def reward(completions, facts, answer, length_weight, **columns):
        seen.extend(zip(facts, answer, length_weight, strict=True))
        return [float(len(completion[0]["content"])) for completion in completions]

    args = PPOConfig(
        str(folder / "out"),
        per_device_train_batch_size=4,
        max_completion_length=4,
        num_ppo_epochs=1,
        **ONE_STEP,
    )
    rows = converted(folder, "fact-rlhf")
    PPOTrainer(str(saved("llava")), reward_funcs=reward, args=args, train_dataset=rows).train()
    assert seen[:4] == [(["Trams run on rails."], "B", -0.5)] * 4


def test_the_severity_of_hsa_dpo_weighs_the_rejected_reply(folder):
    def first_step(*columns):
        args = DPOConfig(str(folder / "out"), dense_gamma=1.0, dense_reduction="sum", logging_steps=1, **ONE_STEP)
        rows = converted(folder, "hsa-dpo").remove_columns(columns)
        trainer = DPOTrainer(str(saved("llava")), args=args, train_dataset=rows)
        assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-5)
        return trainer.state.log_history[0]["grad_norm"]

    assert first_step() != pytest.approx(first_step("rejected_score_weight"), rel=0.1)


def test_the_supervised_rows_of_all_data_sets_train_together(folder):
    columns = ["images", "prompt", "completion"]
    rows = concatenate_datasets([converted(folder, name).select_columns(columns) for name in SUPERVISED_DATA])
    args = SFTConfig(str(folder / "out"), per_device_train_batch_size=len(rows), max_length=None, **ONE_STEP)
    assert len(rows) == 7
    assert SFTTrainer(str(saved("llava")), args, train_dataset=rows).train().training_loss > 0


def test_whole_conversations_train_on_their_replies(folder):
    rows = converted(folder, "whole")
    args = SFTConfig(str(folder / "out"), assistant_only_loss=True, max_length=None, **ONE_STEP)
    assert SFTTrainer(str(saved("llava")), args, train_dataset=rows).train().training_loss > 0


@pytest.mark.parametrize("name", ["coco-captions", "a-okvqa"])
def test_prompts_with_facts_bring_them_to_the_reward(folder, name):
    seen = []

    def reward(completions, facts, **columns):
        seen.extend(zip(facts, columns.get("answer", [None] * 8), strict=False))
        return [float(len(completion[0]["content"])) for completion in completions]

    args = PPOConfig(
        str(folder / "out"),
        per_device_train_batch_size=2,
        max_completion_length=4,
        num_ppo_epochs=1,
        **ONE_STEP,
    )
    rows = converted(folder, name)
    rows = concatenate_datasets([rows] * 2)
    PPOTrainer(str(saved("llava")), reward_funcs=reward, args=args, train_dataset=rows).train()
    facts = {"coco-captions": ["A puppy.", "A red dog."], "a-okvqa": a_okvqa()["rationales"]}[name]
    assert seen[0] == (facts, "B" if name == "a-okvqa" else None)
