"""`trl-vlm doctor`: what it prints, writes and returns for folders of every kind."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.cli.test_startup import run as started
from tests.families import build, load_processor, saved
from trl_vlm.cli.main import main
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.doctor.subject import is_reward_model
from trl_vlm.models.reward_model import load_reward_model

SHORT = JudgeTemplate("judge . {facts}", "facts : {bullets} .", bullet="{fact}", separator=" ; ", opening="it is")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter, a reward model, and an adapter of a reward model."""
    root = tmp_path_factory.mktemp("models")
    base, processor = str(saved("llava", sharp=6.0)), load_processor("llava")
    model, _ = build("llava", sharp=6.0)
    model.name_or_path = base
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(root / "adapter")
    reward = load_reward_model(base, head_seed=1)
    reward.save_pretrained(root / "reward")
    reward.name_or_path = str(root / "reward")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    get_peft_model(reward, lora).save_pretrained(root / "reward_adapter")
    for name in ("reward", "reward_adapter"):
        processor.save_pretrained(root / name)
        SHORT.save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    monkeypatch.setattr("trl_vlm.doctor.report.about_machine", lambda output: {})


def examined(capsys, *words):
    code = main(["doctor", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out or printed.err


def test_without_a_model_it_looks_at_the_machine_and_loads_torch_alone(tmp_path):
    loaded, seconds = started("doctor", "--output-dir", tmp_path / "run", "--json", tmp_path / "report.json")
    assert loaded == ["torch"]
    assert seconds < 5
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["good"] and {found["section"] for found in report["findings"]} == {
        *("versions", "backends", "devices", "folders", "nodes")
    }


@pytest.mark.parametrize(
    ("name", "checks"),
    [("adapter", "pixels matter"), ("reward", "scores follow facts"), ("reward_adapter", "adapter: LORA")],
)
def test_adapters_and_reward_models_are_known_by_their_folders(folders, name, checks, capsys):
    assert is_reward_model(str(folders / name)) == name.startswith("reward")
    code, text = examined(capsys, folders / name)
    assert code == 0, text
    assert checks in text and text.splitlines()[-1].endswith(", 0 differs, 0 not possible")


def test_a_broken_model_is_exit_code_1_and_a_number_in_the_file(tmp_path, capsys):
    model, processor = build("llava", sharp=6.0)
    torch.nn.init.zeros_(model.model.multi_modal_projector.linear_2.weight)
    model.save_pretrained(tmp_path / "blind")
    processor.save_pretrained(tmp_path / "blind")
    code, text = examined(capsys, tmp_path / "blind", "--json", tmp_path / "report.json")
    assert code == 1
    assert "  differs       pixels matter: log-probabilities of replies on other images change by 0.0e+00" in text
    report = json.loads((tmp_path / "report.json").read_text())
    bad = [found for found in report["findings"] if found["verdict"] == "differs"]
    assert not report["good"] and [found["name"] for found in bad] == ["pixels matter"]
    assert bad[0]["number"] == 0.0 and bad[0]["tolerance"] == 1e-6


def test_a_precision_is_what_the_weights_are_loaded_in(capsys):
    code, text = examined(capsys, saved("qwen2_5_vl", sharp=4.0), "--dtype", "bfloat16")
    assert code == 0, text
    assert "precision: bfloat16" in text and "in bfloat16" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [(["./gone"], "there is no folder './gone'"), (["text"], "which reads no images")],
)
def test_what_is_no_vision_language_model_is_refused_with_a_sentence(words, message, tmp_path, monkeypatch, capsys):
    load_processor("llava").tokenizer.save_pretrained(tmp_path / "text")
    settings = json.loads((tmp_path / "text" / "tokenizer_config.json").read_text())
    settings.pop("processor_class", None)
    (tmp_path / "text" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "text" / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *words]) == 1
    assert message in capsys.readouterr().err
