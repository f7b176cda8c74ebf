"""The recipes: every file parses in every combination, and each method trains a tiny model of each family."""

import json
import re
import shlex
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest

from tests import families
from tests.scripts.helpers import write
from trl_vlm.cli.main import METHODS, parser
from trl_vlm.pairs import SentenceEncoder
from trl_vlm.scripts.launcher import read_options

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
MODELS, RECIPES, HARDWARE = (
    sorted(path.stem for path in (FOLDER / name).glob("*.yaml")) for name in ("models", "methods", "hardware")
)
FAMILIES = {
    "llava-1.5-7b": "llava",
    "qwen2.5-vl-3b": "qwen2_5_vl",
    "qwen2.5-vl-7b": "qwen2_5_vl",
    "gemma-3-4b": "gemma3",
}
TINY = {
    "sft": ("images", "prompt", "completion"),
    "dpo": ("images", "prompt", "chosen", "rejected"),
    "dense_dpo": ("images", "prompt", "chosen", "rejected"),
    "reward": ("images", "prompt", "chosen", "rejected", "facts"),
    "ppo": ("images", "prompt", "facts"),
    "bdhs": ("images", "prompt", "completion"),
    "online_dpo": ("images", "prompt"),
}


def command_of(method):
    """The command that the head of a method's file names."""
    text = (FOLDER / "methods" / f"{method}.yaml").read_text()
    return re.search(r"Command: trl-vlm ([\w-]+)", text)[1]


def files(model, method, hardware):
    names = (("models", model), ("methods", method), ("hardware", hardware))
    return [word for kind, name in names for word in ("--config", str(FOLDER / kind / f"{name}.yaml"))]


def script_of(method):
    return import_module(METHODS[command_of(method)][0])


def test_every_model_has_a_family_and_every_method_its_columns():
    assert set(FAMILIES) == set(MODELS) and set(TINY) == set(RECIPES) and len(HARDWARE) >= 6


@pytest.mark.parametrize(("method", "hardware"), list(product(RECIPES, HARDWARE)))
def test_a_recipe_parses_with_every_model(method, hardware):
    for model in MODELS if method == "dpo" else MODELS[:1]:
        words = [*files(model, method, hardware), "--dataset_name", "rows", "--output_dir", "out"]
        launched = parser().parse_args([command_of(method), *words]).launch
        assert launched.config_file.endswith(".yaml")
        *_, options, _, unknown = read_options(script_of(method).make_parser(), launched.training_script_args)
        assert options.model_name_or_path and not unknown
        assert options.load_in_4bit == (hardware == "1x24gb")
        assert options.use_peft == (hardware in ("1x24gb", "1x80gb", "8x80gb_zero2"))


def test_a_later_file_wins_and_a_flag_wins_over_all(tmp_path):
    (tmp_path / "mine.yaml").write_text("beta: 0.7\nseed: 3\n")
    words = [*files("llava-1.5-7b", "dpo", "1x24gb"), "--config", str(tmp_path / "mine.yaml"), "--seed", "4"]
    _, training, model, *_ = read_options(script_of("dpo").make_parser(), words)
    assert (training.beta, training.seed, training.learning_rate, model.load_in_4bit) == (0.7, 4, 5e-6, True)
    (tmp_path / "mine.yaml").write_text("beta\n")
    with pytest.raises(ValueError, match="mine.yaml must hold a YAML mapping"):
        read_options(script_of("dpo").make_parser(), ["--config", str(tmp_path / "mine.yaml"), "--config", "dpo"])


def test_the_job_of_two_nodes_starts_a_command_that_parses():
    job = (FOLDER / "two_nodes.slurm").read_text()
    text = re.search(r'srun bash -c "(trl-vlm .*?)"', job, flags=re.DOTALL)[1].replace("\\\n", " ")
    values = {
        "\\$SLURM_NODEID": "1",
        "$MAIN_ADDRESS": "10.0.0.1",
        "$MAIN_PORT": "2000",
    }
    for name, value in values.items():
        text = text.replace(name, value)
    launched = parser().parse_args(shlex.split(text)[1:]).launch
    assert (launched.num_machines, launched.num_processes, launched.machine_rank) == (2, 16, 1)
    assert launched.main_process_ip == "10.0.0.1"


def test_a_recipe_of_the_package_is_given_by_its_name(tmp_path, monkeypatch):
    names = [path.stem for path in FOLDER.glob("*/*.yaml")]
    assert len(names) == len(set(names)) == len([*MODELS, *RECIPES, *HARDWARE])
    documented = re.findall(
        r"`([\w.-]+)`", (FOLDER.parents[1] / "docs" / "training.md").read_text().split("## Recipes")[1]
    )
    assert set(names) <= set(documented)
    monkeypatch.chdir(tmp_path)  # without a clone
    words = ["--config", "llava-1.5-7b", "--config=dense_dpo", "--config", "1x24gb"]
    _, training, model, *_ = read_options(script_of("dpo").make_parser(), words)
    assert (training.dense_preset, training.lr_scheduler_type) == ("paper", "cosine") and model.load_in_4bit
    assert model.model_name_or_path == "llava-hf/llava-1.5-7b-hf"
    assert parser().parse_args(["dpo", *words]).launch.config_file.endswith("single.yaml")


def test_a_file_of_ones_own_goes_before_a_recipe_and_what_is_neither_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo").write_text("beta: 0.7\n")
    assert read_options(script_of("dpo").make_parser(), ["--config", "dpo"])[1].beta == 0.7
    with pytest.raises(ValueError, match="--config mine.yaml is neither a file nor one of 1x24gb, .*dense_dpo"):
        read_options(script_of("dpo").make_parser(), ["--config", "mine.yaml"])


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """Reward models by family, trained by the recipe when they are first asked for."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(f"reward-{name}")
            train("reward", name, folder)
            made[name] = str(folder / "out")
        return made[name]

    return of


def train(method, model, folder, *more):
    """Trains by a recipe, for one step, with a tiny model of the family in place of the checkpoint."""
    data = write(folder, "parquet", TINY[method])
    checkpoint = families.saved(FAMILIES[model], sharp=4.0)
    given = ["--model_name_or_path", str(checkpoint), "--dataset_name", data, "--output_dir", str(folder / "out")]
    size = "4" if method == "ppo" else "2"
    tiny = ["--max_steps", "1", "--total_batch_size", size, "--optim", "adamw_torch", "--report_to", "none"]
    tiny += ["--logging_steps", "1", "--lora_r", "4"]
    script_of(method).main([*files(model, method, "1x24gb"), *given, *tiny, *more])
    return json.loads((folder / "out" / "history.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in MODELS if name != "qwen2.5-vl-7b"])
@pytest.mark.parametrize("method", RECIPES)
def test_a_recipe_trains_a_tiny_model_of_its_family(method, model, tmp_path, reward_model, monkeypatch):
    monkeypatch.setattr(SentenceEncoder, "__call__", lambda encoder, texts, others: [0.5] * len(texts))
    more = {
        "ppo": lambda: ["--reward_model_name_or_path", reward_model(model), "--max_completion_length", "4"],
        "online_dpo": lambda: ["--reward_model", reward_model(model), "--max_new_tokens", "4"],
        "bdhs": lambda: ["--max_new_tokens", "4"],
    }
    log = train(method, model, tmp_path, *more.get(method, list)())
    assert any("loss" in entry for entry in log)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
