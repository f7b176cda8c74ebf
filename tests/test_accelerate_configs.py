"""The files of accelerate_configs/, read as `accelerate launch --config_file` reads them; nothing is launched."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[1] / "accelerate_configs"
KINDS = {
    "single": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "zero1": DistributedType.DEEPSPEED,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "zero3_offload": DistributedType.DEEPSPEED,
    "fsdp2": DistributedType.FSDP,
}


def test_there_is_one_file_for_each_way_to_launch():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_loads_and_means_what_its_name_says(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.num_machines == 1
    assert config.num_processes == (1 if name == "single" else 8)
    assert config.mixed_precision == "bf16"
    assert not config.use_cpu


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_a_zero_file_has_its_stage(name, stage):
    assert load_config_from_file(str(FOLDER / f"{name}.yaml")).deepspeed_config["zero_stage"] == stage


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_zero3_writes_a_whole_model(name):
    settings = load_config_from_file(str(FOLDER / f"{name}.yaml")).deepspeed_config
    assert settings["zero3_save_16bit_model"] is True
    assert settings["offload_param_device"] == ("cpu" if name == "zero3_offload" else "none")


def test_fsdp_is_the_second_version_and_writes_a_whole_model():
    settings = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert settings["fsdp_version"] == 2
    assert settings["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize("name", KINDS)
def test_a_file_says_when_to_use_it(name):
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# ")
