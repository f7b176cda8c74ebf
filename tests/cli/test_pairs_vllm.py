"""`trl-vlm pairs --use-vllm`: replies from a server or an engine in the process, and no weights of the policy here."""

import json
import logging

import pytest
from trl.generation import vllm_client

from tests.cli.test_pairs import arguments, world  # noqa: F401  a fixture
from tests.families import load_processor, saved
from tests.rewards.helpers import Lengths, running
from tests.vllm_stand_in import Client, install, said
from trl_vlm.cli import main as cli
from trl_vlm.cli import pairs as pairs_cli
from trl_vlm.models import generation
from trl_vlm.rewards.server import make_app
from trl_vlm.trainers.dpo import vllm

SHORT = ["--max-new-tokens", "4", "--json", "--use-vllm"]


@pytest.fixture
def installed(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(generation, "load_generative_model", None)


def run(world, method, *more):  # noqa: F811
    """The pairs that a command makes."""
    words = arguments(world, method, *SHORT, *more)
    words[words.index("--output") + 1] = str(world / "out.jsonl")
    assert cli.main(words) == 0
    return [json.loads(line) for line in (world / "out.jsonl").read_text().splitlines()]


class Letters(Lengths):
    """Scores a reply by its letters; those that vLLM's stand-in samples are all as long."""

    def __call__(self, prompts, completions, images, facts, row_name):
        return [float(sum(map(ord, completion[0]["content"]))) for completion in completions]


def sampled():
    """What the stand-ins can say."""
    decode = load_processor("llava").decode
    return {decode(said(seed, 1.0, 4), skip_special_tokens=True).strip() for seed in range(2**6)}


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_samples_come_from_vllm_and_the_policys_weights_are_not_loaded(installed, world, mode):  # noqa: F811
    pairs = run(world, "self-samples", "--vllm-mode", mode)
    assert len(pairs) == 3 and {pair["rejected"][0]["content"] for pair in pairs} <= sampled()
    assert "use_vllm" in (world / "out.md").read_text()
    if mode == "server":
        (client,) = Client.made
        assert client.base_url == "http://0.0.0.0:8000" and len(client.requests) == 3
        assert client.requests[0][1] is not None  # the image, as the server processed it


def test_a_judge_compares_what_vllm_sampled_and_flags_may_be_written_as_in_training(installed, world, caplog):  # noqa: F811
    address = ["--vllm_server_base_url", "http://gpu-7:8000", "--vllm_mode", "server", "--use_vllm"]
    with (
        running(make_app(Letters(), {"model": "r", "revision": None, "template": {}})) as server,
        caplog.at_level(logging.WARNING),
    ):
        pairs = run(world, "judged", *address, "--reward-server", server.address)
    assert {reply[0]["content"] for pair in pairs for reply in (pair["chosen"], pair["rejected"])} <= sampled()
    assert Client.made[0].base_url == "http://gpu-7:8000"
    assert "The vLLM server has 'a-model', and `--model` is" in caplog.text


def test_where_vllm_samples_does_not_stop_a_run_from_going_on_and_whether_it_does_counts(world):  # noqa: F811
    parse = cli.parser().parse_args
    plain = pairs_cli.settings(parse(arguments(world, "self-samples")))
    here = pairs_cli.settings(parse(arguments(world, "self-samples", "--use-vllm")))
    elsewhere = ["--use-vllm", "--vllm-mode", "server", "--vllm-server-port", "9"]
    assert (
        pairs_cli.settings(parse(arguments(world, "self-samples", *elsewhere))) == here == plain | {"use_vllm": True}
    )


def refused(world, capsys, *more):  # noqa: F811
    assert cli.main(arguments(world, "self-samples", "--use-vllm", "--push-to-hub", "me/pairs", *more)) == 1
    assert not (world / "out").exists() and not (world / "out.partial").exists()
    return capsys.readouterr().err


def test_what_is_missing_is_said_before_any_work(world, capsys, monkeypatch):  # noqa: F811
    """No repository is asked for, which would need a network."""
    assert "`use_vllm` needs vLLM, which is not installed" in refused(world, capsys)
    client = vllm.VLLMClient
    install(monkeypatch)
    monkeypatch.setattr(vllm, "VLLMClient", client)
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    nobody = ["--vllm-mode", "server", "--vllm-server-base-url", "http://127.0.0.1:9", "--vllm-server-timeout", "0"]
    assert "error: The vLLM server can't be reached at http://127.0.0.1:9" in refused(world, capsys, *nobody)
    assert "`--dtype bfloat16` has no effect with `--use-vllm`" in refused(world, capsys, "--dtype", "bfloat16")
    adapter = world / "adapter"
    adapter.mkdir()
    base = {"peft_type": "LORA", "base_model_name_or_path": str(saved("llava", sharp=4))}
    (adapter / "adapter_config.json").write_text(json.dumps(base))
    assert "is an adapter, and vLLM samples from a model with all weights. Merge it (`trl-vlm merge " in refused(
        world, capsys, "--model", str(adapter)
    )


@pytest.mark.parametrize("method", ["bdhs", "povid", "corrupted"])
def test_sources_that_work_inside_the_model_have_no_such_flag(world, method, capsys):  # noqa: F811
    required = ["--writer-model", "w"] if method == "corrupted" else []
    with pytest.raises(SystemExit, match="2"):
        cli.parser().parse_args(arguments(world, method, *required, "--use-vllm"))
    assert "unrecognized arguments: --use-vllm" in capsys.readouterr().err
