"""The rows of every converter train one step, as they come from the file."""

import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
from converter_records import (
    FACTS,
    NLF_COLUMNS,
    image_folder,
    llava_preference,
    nlf,
    povid,
    rlaif_v,
    rlhf_v,
    vlfeedback,
)
from datasets import concatenate_datasets, load_dataset

from tests.families import saved
from trl_vlm import RewardConfig, RewardTrainer
from trl_vlm.data.converters import Source, convert

PREFERENCE_DATA = {
    "rlhf-v": rlhf_v(),
    "rlaif-v": rlaif_v(),
    "vlfeedback": vlfeedback([("5", "5", "5"), ("1", "1", "1")]),
    "povid": povid(),
    "llava-human-preference": llava_preference(),
    "nlf": nlf(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every preference data set, converted into a folder of its own."""
    world = tmp_path_factory.mktemp("world")
    image_folder(
        world / "images", "bus.png", "COCO_train2014_000000000009.jpg", "000000111111.jpg", "000000000042.jpg"
    )
    (world / "facts.json").write_text(json.dumps(FACTS))
    for name, record in PREFERENCE_DATA.items():
        parquet.write_table(pyarrow.Table.from_pylist([record]), world / f"{name}.parquet")
        options = NLF_COLUMNS if name == "nlf" else {}
        options = {"facts": world / "facts.json"} if name == "llava-human-preference" else options
        source = Source(str(world / f"{name}.parquet"))
        convert(name, source, world / name, images=world / "images", progress=False, **options)
    return world


def converted(folder, name):
    return load_dataset(str(folder / name), split="train", cache_dir=str(folder / "cache"))


def test_the_rows_of_all_preference_data_sets_train_a_reward_model_together(folder):
    columns = ["images", "prompt", "chosen", "rejected"]
    rows = concatenate_datasets([converted(folder, name).select_columns(columns) for name in PREFERENCE_DATA])
    assert len(rows) == len(PREFERENCE_DATA)
    assert loss_of_one_step(rows, folder) > 0


def test_converted_rows_with_facts_train_a_reward_model(folder):
    rows = converted(folder, "llava-human-preference")
    assert loss_of_one_step(rows, folder) > 0


def loss_of_one_step(rows, folder):
    args = RewardConfig(
        str(folder / "out"),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        check_pixels=False,
    )
    trainer = RewardTrainer(str(saved("llava")), args, train_dataset=rows)
    return trainer.train().training_loss
