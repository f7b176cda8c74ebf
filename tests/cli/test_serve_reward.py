"""`trl-vlm serve-reward`: who may ask, and PPO with a served reward model."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import families
from tests.rewards.helpers import Lengths, free_port, running, save_reward_model
from tests.scripts.helpers import options, write
from trl_vlm.cli.main import main, parser
from trl_vlm.cli.serve_reward import check_host, is_this_machine
from trl_vlm.rewards import RemoteReward
from trl_vlm.rewards.server import make_app
from trl_vlm.scripts import grpo, online_dpo, ppo, rloo

KEY = "a-key-that-nobody-shows"


def test_it_serves_this_machine_alone_unless_told_otherwise():
    given = parser().parse_args(["serve-reward", "outputs/reward"])
    assert (given.host, given.port, given.key_variable, given.without_key) == ("127.0.0.1", 8100, None, False)


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("localhost", True)]
    + [("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("gpu-7", False), ("", False)],
)
def test_other_machines_need_a_key_or_an_explicit_permission(host, is_local):
    assert is_this_machine(host) == is_local
    check_host(host, has_key=True)
    if not is_local:
        with pytest.raises(ValueError, match="lets other machines ask, and there is no key"):
            check_host(host, has_key=False)


def test_a_missing_key_a_missing_package_and_a_model_without_a_head_are_said_before_anything_is_loaded(
    monkeypatch, capsys
):
    assert main(["serve-reward", "nowhere/at/all", "--host", "0.0.0.0"]) == 1
    assert main(["serve-reward", "x", "--key-variable", "NOT_SET"]) == 1
    assert main(["serve-reward", "./nowhere"]) == 1
    assert main(["serve-reward", str(families.saved("llava"))]) == 1
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve-reward", "x"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "there is no key" in said[0] and "'NOT_SET' is empty or not set" in said[1] and "no folder" in said[2]
    assert "There is no judge template" in said[3] and "pip install 'trl-vlm[serve]'" in said[4]


@pytest.mark.parametrize(
    ("script", "own", "refusal", "given"),
    [
        (ppo, "--reward_model_name_or_path", "cannot be combined: each is", ["--max_completion_length", "4"]),
        (online_dpo, "--reward_model", "Set exactly one of", ["--max_new_tokens", "4", "--max_length", "None"]),
    ],
)
def test_a_run_remembers_which_model_was_served_and_not_where(tmp_path, script, own, refusal, given):
    data = write(tmp_path, "parquet", ("images", "prompt", "facts"))

    def dry_run(model: str, *more: str) -> None:
        with running(make_app(Lengths(), {"model": model, "revision": None, "template": {}})) as server:
            words = options(families.saved("llava"), data, tmp_path / "out", *given, *more)
            script.main([*words, "--reward_server", server.address, "--dry_run"])

    dry_run("one")
    (tmp_path / "out").mkdir(exist_ok=True)
    settings = tmp_path / "out" / "settings.json"
    settings.write_text(json.dumps({"reward served": {"model": "one", "revision": None, "template": {}}}))
    dry_run("one")  # at another port
    with pytest.raises(SystemExit, match="`reward served` was .*one.* and is now .*two"):
        dry_run("two")
    with pytest.raises(SystemExit, match=refusal):
        dry_run("one", own, str(families.saved("llava")))
    gone = ["--reward_server", "http://127.0.0.1:9"]
    with pytest.raises(SystemExit, match="No reward server answers at http://127.0.0.1:9"):
        script.main([*options("m", data, tmp_path / "out"), *gone])


@pytest.mark.slow
def test_ppo_learns_from_a_served_reward_model_what_it_learns_from_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", KEY)
    save_reward_model(tmp_path / "reward")
    data = write(tmp_path, "parquet", ("images", "prompt", "facts"))
    port, log = free_port(), tmp_path / "server.log"
    words = ["serve-reward", str(tmp_path / "reward"), "--port", str(port), "--key-variable", "REWARD_KEY"]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "trl_vlm.cli", *words], stdout=file, stderr=file, env={**os.environ}
        )
    try:
        common = ("--max_completion_length", "4", "--missing_eos_penalty", "1", "--share_base", "False")
        own = ("--reward_model_name_or_path", str(tmp_path / "reward"))
        model = families.saved("llava", sharp=4.0)
        ppo.main(options(model, data, tmp_path / "own", *common, *own))
        reward = RemoteReward(f"http://127.0.0.1:{port}", key_variable="REWARD_KEY")
        while server.poll() is None:
            try:
                assert reward.health()["template"]["opening"] == "it is"
                break
            except ConnectionError:
                time.sleep(0.2)
        served = ("--reward_server", reward.address, "--reward_server_key_variable", "REWARD_KEY")
        served += ("--value_model_name_or_path", str(tmp_path / "reward"))
        ppo.main(options(model, data, tmp_path / "served", *common, *served))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("own", "served")]
    numbers = [
        {name: value for entry in history for name, value in entry.items() if name in ("loss", "ppo/score")}
        for history in histories
    ]
    assert numbers[0] and numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    assert any("rewards/reward_model/mean" in entry for entry in histories[1])
    assert "Uvicorn running" in log.read_text() and KEY not in log.read_text()
    assert KEY not in (tmp_path / "served" / "settings.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", [grpo, rloo], ids=["grpo", "rloo"])
def test_trls_rollout_methods_ask_a_server_as_well(tmp_path, script):
    data = write(tmp_path, "parquet", ("images", "prompt", "facts"))
    reward = Lengths()
    with running(make_app(reward, {"model": "lengths", "revision": None, "template": {}})) as server:
        rollouts = ("--max_completion_length", "4", "--num_generations", "2", "--reward_server", server.address)
        script.main(options(families.saved("llava"), data, tmp_path / "out", *rollouts))
    log = json.loads((tmp_path / "out" / "history.json").read_text())
    means = [entry["rewards/reward_model/mean"] for entry in log if "rewards/reward_model/mean" in entry]
    first = [len(reply) + 1 / 8 for reply in reward.calls[0]]  # an eighth for the image of each row
    assert means[0] == pytest.approx(sum(first) / len(first))
