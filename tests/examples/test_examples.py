"""Each example runs on the small world's files and on a user's own, in both forms of messages; and may be copied."""

import ast
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

from tests import families
from tests.scripts.helpers import write
from trl_vlm.pairs import SentenceEncoder
from trl_vlm.testbed.files import write_files

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHORT = [path for path in EXAMPLES if path.stem != "fact_rlhf"]
ROWS = {
    "dense_dpo": ("corrections", ("images", "prompt", "chosen", "rejected")),
    "bdhs": ("sft", ("images", "prompt", "completion")),
    "online_dpo": ("prompts", ("images", "prompt", "facts")),
    "ppo": ("prompts", ("images", "prompt", "facts")),
    "reward_model": ("pairs", ("images", "prompt", "chosen", "rejected", "facts")),
}
TEST = ("images", "prompt", "objects", "answer")
FEW_STEPS = {
    **{"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "gradient_checkpointing": False},
    **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3, "total_batch_size": 2},
}
SMALL = {
    "bdhs": {"max_new_tokens": 4, "max_sentence_tokens": 4, "mask_ratio": 0.9},
    "online_dpo": {"max_new_tokens": 4},
    "ppo": {"max_completion_length": 4, "num_ppo_epochs": 1, "num_mini_batches": 1},
}


def run(monkeypatch, name, **options):
    """Runs an example as `python examples/<name>.py` does."""
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *words])
    monkeypatch.setattr(SentenceEncoder, "__call__", lambda encoder, texts, others: [0.5] * len(texts))
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The small world's files, its model hardly trained."""
    return write_files(tmp_path_factory.mktemp("world"), count=8, quick=True)


def inputs(name, source, world, folder):
    """Model, rows and rows to evaluate on: of the world, or of a user."""
    rows, columns = ROWS[name]
    if source == "world":
        found = {"model_name_or_path": world / "model", "dataset_name": world / f"{rows}.parquet", "use_peft": False}
        return found, world / "test.parquet"
    parts = source == "parts"
    data, test = (write(folder, "parquet", names, parts=parts, count=20) for names in (columns, TEST))
    return {"model_name_or_path": families.saved("llava", sharp=4.0), "dataset_name": data}, test


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory, world):
    """Reward models that the example has trained, by where the rows come from."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for source in ("world", "strings"):
            folder = tmp_path_factory.mktemp(f"reward_{source}")
            given, _ = inputs("reward_model", source, world, folder)
            run(patch, "reward_model", **given, **FEW_STEPS, output_dir=folder / "out")
            made[source] = folder / "out"
    return {**made, "parts": made["strings"]}


@pytest.mark.parametrize("source", ["world", "strings", "parts"])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "reward_model"])
def test_an_example_trains_and_compares_before_with_after(
    name, source, world, reward_models, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    given, test = inputs(name, source, world, tmp_path)
    more = {"reward_model": reward_models[source]} if name in ("online_dpo", "ppo") else {}
    evaluation = {"evaluation_dataset": test, "max_reply_tokens": 4}
    run(
        monkeypatch,
        name,
        **given,
        **FEW_STEPS,
        **SMALL.get(name, {}),
        **more,
        **evaluation,
        output_dir=tmp_path / "out",
    )
    assert json.loads((tmp_path / "out" / "done.json").read_text()) == {"steps": 2}
    before, after = (record for record in caplog.messages if record.startswith(("before: ", "after: ")))
    for metric in ("chair_i", "recall", "pope_accuracy"):
        assert f"{metric} 0." in before + after or f"{metric} 1." in before + after
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == (source != "world")


@pytest.mark.parametrize("source", ["strings", "world"])
def test_the_reward_model_is_measured_on_pairs_that_were_held_out(
    source, reward_models, world, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    given, _ = inputs("reward_model", source, world, tmp_path)
    run(monkeypatch, "reward_model", **given, **FEW_STEPS, output_dir=tmp_path / "out")
    assert re.search(r"\d of 1 held-out pairs are told right", caplog.text)
    assert "pairs are held out: " in caplog.text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_can_be_copied(path):
    """The header installs what the imports need, and nothing is imported from beside the file."""
    text = path.read_text(encoding="utf-8")
    header = re.search(r"# /// script\n(.*?)# ///", text, flags=re.DOTALL).group(1)
    (requirement,) = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))["dependencies"]
    extras = re.fullmatch(r"trl-vlm\[([\w,]+)\]", requirement).group(1).split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras) <= set(project["optional-dependencies"])
    installed = {re.match(r"[\w-]+", name).group() for name in project["dependencies"]} | {"trl_vlm"}
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} <= installed | sys.stdlib_module_names


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert 60 <= len(path.read_text(encoding="utf-8").splitlines()) <= 130
