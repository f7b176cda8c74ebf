"""`trl-vlm <method>`: options of a script and of `accelerate launch` in one line, and what is launched."""

import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import yaml
from trl.scripts import dpo as trl_dpo

from tests import families
from tests.scripts.helpers import losses, options, write
from trl_vlm.cli.main import METHODS, main, parser
from trl_vlm.scripts.launcher import config_file, without

ROOT = Path(__file__).parents[2]
PAIRS = ("images", "prompt", "chosen", "rejected")
GIVEN = ["--model_name_or_path", "m", "--dataset_name", "d"]


def launch(*words):
    return parser().parse_args(words).launch


@pytest.mark.parametrize("method", METHODS)
def test_each_method_starts_its_script(method):
    launched = launch(method, *(GIVEN if method != "demo" else []))
    assert launched.module and launched.training_script == METHODS[method][0]
    assert launched.training_script_args == (GIVEN if method != "demo" else [])


def test_options_of_the_script_and_of_the_launcher_may_be_mixed():
    launched = launch("dpo", "--num_processes", "4", *GIVEN, "--accelerate_config", "zero3", "--beta", "4")
    assert launched.training_script_args == [*GIVEN, "--beta", "4"]
    assert launched.num_processes == 4
    assert launched.config_file.endswith("accelerate_configs/zero3.yaml")


def test_the_file_of_config_may_hold_options_of_the_launcher_too(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "m", "accelerate_config": "fsdp2", "num_processes": 2}))
    launched = launch("reward", "--config", str(file), "--seed", "3")
    assert launched.config_file.endswith("fsdp2.yaml") and launched.num_processes == 2
    assert launched.training_script_args == ["--config", str(file), "--seed", "3"]


def test_a_script_reads_such_a_file_when_it_is_launched_by_hand(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"accelerate_config": "zero2", "num_machines": 1}))
    trained = METHODS["dpo"][0]
    with pytest.raises(SystemExit, match="`--model_name_or_path` is missing"):
        sys.modules[trained].main(["--config", str(file)])
    file.write_text(yaml.safe_dump({"num_machine": 1, "betta": 2}))
    with pytest.raises(SystemExit, match=r"There is no option --betta. Did you mean --beta"):
        sys.modules[trained].main(["--config", str(file)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpo", "--bta", "1"], "There is no option --bta. Did you mean --beta"),
        (["ppo", "--accelerate_config", "zero9"], "zero9 is neither a file nor one of ddp, fsdp2, single, zero1"),
        (["sft", "--config"], "the name of a file is missing"),
        (["sft", "--config=nowhere.yaml"], "--config nowhere.yaml is neither a file nor one of 1x24gb, "),
        (["sft", "--config", "nowhere.yaml"], "--config nowhere.yaml is neither a file nor one of 1x24gb, "),
        (["dpo", *GIVEN, "stray"], "There is no option stray"),
    ],
)
def test_a_wrong_option_is_a_sentence_before_anything_is_launched(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(words)
    assert message in capsys.readouterr().err


def test_the_demo_is_one_process_unless_a_configuration_is_given():
    assert launch("demo", "--quick").num_processes == 1
    assert launch("demo", "--num_processes", "2").num_processes == 2
    assert launch("demo", "--accelerate_config", "ddp").num_processes is None
    assert launch("demo", "--accelerate-config=ddp").num_processes is None


def test_words_are_taken_out_in_their_order():
    assert without(["--a", "2", "--b", "2"], ["--b", "2"]) == ["--a", "2"]


def test_a_file_of_ones_own_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").write_text("")
    assert str(config_file("zero3")) == "zero3"
    assert config_file("zero2").is_file()


@pytest.mark.slow
def test_dpo_with_nothing_of_ours_has_the_losses_of_trls_command(tmp_path):
    model = families.saved("gemma3", sharp=4.0)  # its template ends every reply, which that of LLaVA-1.5 does not
    data = write(tmp_path, "folder", PAIRS)
    given = options(model, data, tmp_path / "theirs", "--max_length", "None", "--dtype", "float32", "--seed", "1")
    given += ["--bf16", "False", "--use_cpu"]
    trl_dpo.main(*trl_dpo.make_parser().parse_args_and_config(given))
    log = json.loads((tmp_path / "theirs" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    theirs = [entry["loss"] for entry in log if "loss" in entry]
    given[given.index(str(tmp_path / "theirs"))] = str(tmp_path / "ours")
    assert main(["dpo", "--num_processes", "1", "--num_machines", "1", *given]) == 0
    assert losses(tmp_path / "ours") == pytest.approx(theirs, abs=1e-6) and len(theirs) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_a_script_that_fails_in_a_process_ends_with_its_message():
    launcher = ["--accelerate_config", "zero2", "--num_processes", "2"]
    words = ["dpo", *launcher, "--model_name_or_path", "no/such/one"]
    done = subprocess.run([sys.executable, "-m", "trl_vlm.cli", *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no folder" in done.stderr and "failed first, with exit code 1" in done.stderr
    assert "launch.py" not in done.stderr


SLEEPER = """import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(100)
"""
LAUNCHED = """import sys
from argparse import Namespace
from accelerate.commands.launch import launch_command_parser
from trl_vlm.cli.train import run
words = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
sys.exit(run(Namespace(launch=launch_command_parser().parse_args([*words, "--quiet", *sys.argv[1:]]))))
"""


@pytest.mark.slow
def test_who_terminates_the_launcher_terminates_the_script(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    written = tmp_path / "number"
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHED, str(tmp_path / "sleeper.py"), str(written)])
    while not (written.exists() and written.read_text()):
        assert launcher.poll() is None
        time.sleep(0.1)
    script = psutil.Process(int(written.read_text()))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) != 0
    script.wait(timeout=20)
    assert not script.is_running()


@pytest.mark.slow
def test_the_wheel_holds_the_configurations_the_recipes_and_the_demo(tmp_path):
    source = tmp_path / "source"
    for name in ("trl_vlm", "accelerate_configs", "examples"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*build, "-w", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {"trl_vlm/demo.py", "trl_vlm/accelerate_configs/zero3.yaml", "trl_vlm/py.typed"} <= set(names)
    recipes = {path.relative_to(ROOT / "examples") for path in (ROOT / "examples" / "recipes").glob("*/*.yaml")}
    assert {f"trl_vlm/{path}" for path in recipes} | {"trl_vlm/recipes/two_nodes.slurm"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks"))]
