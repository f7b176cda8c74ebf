"""A run begins only when it can end: wrong inputs are refused with a sentence, before a model is loaded."""

import shutil
import socket

import pytest
import torch
from trl import ModelConfig, get_quantization_config

from tests import families
from tests.scripts.helpers import options, row, with_images, write
from trl_vlm.scripts import dpo, online_dpo, ppo
from trl_vlm.scripts.arguments import accumulation, hardware_defaults, script_parser
from trl_vlm.scripts.inputs import bytes_to_write, check_address, check_first_row, check_folder

PAIRS = ("images", "prompt", "chosen", "rejected")


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Nothing here may come as far as a trainer."""

    def refused(*args, **kwargs):
        raise AssertionError("a trainer was made")

    for module, name in ((dpo, "DPOTrainer"), (online_dpo, "DPOTrainer"), (ppo, "PPOTrainer")):
        monkeypatch.setattr(module, name, refused)


@pytest.fixture
def model():
    return families.saved("llava")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--dataset_name": "nowhere.jsonl"}, "`--dataset_name`: There is no file or folder 'nowhere.jsonl'"),
        ({"--dataset_name": "rows.csv"}, "`--dataset_name`: .*files that can be read end in"),
        ({"--dataset_name": None}, "`--dataset_name` is missing"),
        ({"--model_name_or_path": None}, "`--model_name_or_path` is missing"),
        ({"--model_name_or_path": "./no_model"}, "there is no folder './no_model'"),
        ({"--model_name_or_path": "."}, "holds neither config.json nor adapter_config.json"),
        ({"--batch_size": "4"}, "There is no option --batch_size. Did you mean .*"),
        ({"--lerning_rate": "4"}, "There is no option --lerning_rate. Did you mean --learning_rate"),
        ({"--dense_gamma": "0.5", "--dense_reduction": "mean"}, "`dense_gamma` is 0.5"),
        ({"--use_peft": "True"}, "`--use_peft` needs `--lora_target_modules`, for PEFT knows none for llava"),
        ({"--config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"--dataset_train_split": "other"}, "`--dataset_name`: .*is a single file: leave out split"),
    ],
)
def test_a_wrong_option_is_a_sentence(tmp_path, model, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").touch()
    given = options(model, write(tmp_path, "parquet", PAIRS), tmp_path / "out")
    for name, value in changes.items():
        if name in given:
            place = given.index(name)
            del given[place : place + 2]
        given += [name, value] if value is not None else []
    with pytest.raises(SystemExit, match=message):
        dpo.main(given)


def test_a_column_that_is_missing_is_named(tmp_path, model):
    data = write(tmp_path, "jsonl", ("images", "prompt", "chosen"))
    with pytest.raises(SystemExit, match="`--dataset_name`, row 0, column 'rejected': it is missing"):
        dpo.main(options(model, data, tmp_path / "out"))


def test_an_image_that_is_missing_is_named(tmp_path, model):
    data = write(tmp_path, "jsonl", PAIRS)
    (tmp_path / "0.png").unlink()
    with pytest.raises(SystemExit, match="`--dataset_name`, row 0, column 'images': .*0.png"):
        dpo.main(options(model, data, tmp_path / "out"))


def test_a_split_that_is_missing_is_named_with_those_that_are_there(tmp_path, model):
    data = write(tmp_path, "saved", PAIRS)
    with pytest.raises(SystemExit, match=r"has the splits \['train', 'test'\]; got 'validation'"):
        dpo.main(options(model, data, tmp_path / "out", "--dataset_train_split", "validation"))


def test_rows_to_evaluate_on_are_checked_like_the_others(tmp_path, model):
    data, other = write(tmp_path, "parquet", PAIRS), write(tmp_path, "parquet", ("images", "prompt"))
    more = ("--eval_strategy", "steps", "--eval_dataset_name", other)
    with pytest.raises(SystemExit, match="`--eval_dataset_name`, row 0, column 'chosen': it is missing"):
        dpo.main(options(model, data, tmp_path / "out", *more))


def test_a_run_without_a_reward_or_with_an_unknown_one_is_refused(tmp_path, model):
    prompts = write(tmp_path, "parquet", ("images", "prompt"))
    with pytest.raises(SystemExit, match="There is no reward"):
        ppo.main(options(model, prompts, tmp_path / "out"))
    with pytest.raises(SystemExit, match="`--reward_funcs` names 'nowhere.reward', which cannot be found"):
        ppo.main(options(model, prompts, tmp_path / "out", "--reward_funcs", "nowhere.reward"))


def test_fewer_prompts_than_a_rollout_are_refused(tmp_path, model):
    prompts = write(tmp_path, "parquet", ("images", "prompt"), count=2)
    more = ("--reward_funcs", "tests.scripts.test_scripts.short", "--num_mini_batches", "2")
    with pytest.raises(SystemExit, match="There are 2 prompts, and one rollout needs 4"):
        ppo.main(options(model, prompts, tmp_path / "out", *more))


def test_a_judge_that_nobody_serves_is_refused(tmp_path, model, monkeypatch):
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_address(f"http://127.0.0.1:{port}/v1")
    prompts = write(tmp_path, "parquet", ("images", "prompt"))
    judge = ("--judge_model", "judge", "--endpoint", f"http://127.0.0.1:{port}/v1")
    with pytest.raises(SystemExit, match=f"`--endpoint`: nobody answers at http://127.0.0.1:{port}/v1"):
        online_dpo.main(options(model, prompts, tmp_path / "out", *judge))
    with pytest.raises(SystemExit, match="The judge is not named. Set exactly one of `judge_model`"):
        online_dpo.main(options(model, prompts, tmp_path / "out"))
    with pytest.raises(ValueError, match="'localhost:8000' is no address"):
        check_address("localhost:8000")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, model):
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit, match="out"):
        dpo.main(options(model, write(tmp_path, "parquet", PAIRS), tmp_path / "out"))


def test_too_little_space_is_refused_before_the_training(tmp_path, model, monkeypatch):
    weights = (model / "model.safetensors").stat().st_size
    assert bytes_to_write(model, adapter=False, checkpoints=2) == 7 * weights
    assert bytes_to_write("owner/not-here", adapter=False, checkpoints=2) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5 * weights))
    check_folder(tmp_path, 4 * weights)
    data = write(tmp_path, "parquet", PAIRS)
    with pytest.raises(SystemExit, match="of free space, and checkpoints and model need about"):
        dpo.main(options(model, data, tmp_path / "out"))


def test_the_first_row_needs_one_of_several_columns(tmp_path):
    rows = [{"prompt": row(tmp_path, 0, False)["prompt"]}]
    with pytest.raises(ValueError, match="none of the columns objects, answer; it has prompt"):
        check_first_row(rows, "ppo", "evaluation_dataset", columns=("objects", "answer"))
    with pytest.raises(ValueError, match="`--evaluation_dataset`: there are no rows"):
        check_first_row([], "ppo", "evaluation_dataset")


def test_a_first_row_that_does_not_encode_is_refused(tmp_path):
    bad = row(tmp_path, 0, True)
    bad["prompt"][0]["content"].insert(0, {"type": "image", "image": str(tmp_path / "0.png")})
    with pytest.raises(ValueError, match="`--dataset_name`"):
        check_first_row([bad], "dpo", "dataset_name", families.load_processor("llava"))


def test_an_address_in_the_first_row_is_refused_and_not_opened(tmp_path):
    stored = row(tmp_path, 0, False) | {"images": [{"bytes": None, "path": "http://127.0.0.1:9/a.png"}]}
    rows = with_images([stored])
    with pytest.raises(ValueError, match="`--dataset_name`.* is an address, and training opens no network connection"):
        check_first_row(rows, "dpo", "dataset_name", families.load_processor("llava"))


def test_accumulation_divides_or_says_what_would():
    assert accumulation(32, 4, 2) == 4
    with pytest.raises(ValueError, match="A batch of 12 .* Give a multiple of 8"):
        accumulation(12, 4, 2)


def test_scripts_load_in_bfloat16_on_cuda_and_float32_on_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert hardware_defaults() == {"dtype": "bfloat16"}
    (model,) = script_parser(ModelConfig).parse_args_and_config(["--load_in_4bit"])
    assert model.dtype == "bfloat16"
    assert get_quantization_config(model).bnb_4bit_compute_dtype == torch.bfloat16
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert hardware_defaults() == {"bf16": False, "use_cpu": True}
    assert dpo.make_parser().parse_args_and_config(["--output_dir", "out"])[2].dtype == "float32"


def test_trls_own_use_of_a_deprecated_name_warns_nobody(tmp_path, model, recwarn):
    dpo.main(options(model, write(tmp_path, "parquet", PAIRS), tmp_path / "out", "--dry_run"))
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]
