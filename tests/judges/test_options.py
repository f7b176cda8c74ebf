import dataclasses
import inspect

import pytest
from transformers import HfArgumentParser

from tests.families import image, saved
from tests.rewards.helpers import Lengths, running
from trl_vlm.cli.main import parser
from trl_vlm.judges import (
    JUDGES,
    ChatOptions,
    Comparison,
    EndpointChat,
    JudgeOptions,
    LocalChat,
    PairwiseJudge,
    RewardJudge,
    judge_of,
)
from trl_vlm.judges import options as judge_options
from trl_vlm.judges.options import WriterOptions
from trl_vlm.rewards.server import make_app
from trl_vlm.scripts import online_dpo
from trl_vlm.scripts.job import options_of

SERVER = "http://localhost:8000/v1"
ABOUT = {"model": "owner/reward", "revision": "abc", "template": {"opening": "it is"}}


def test_a_server_without_a_key_is_asked_without_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    judge = judge_of(JudgeOptions(endpoint=SERVER, judge_model="m", cache=str(tmp_path)))
    assert isinstance(judge.chat, EndpointChat) and judge.chat.base_url == SERVER
    assert "hf_secret" not in str(vars(judge.chat._client))


def test_answers_are_kept_and_requests_are_capped_unless_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    chat = ChatOptions(endpoint=SERVER).chat("m")
    assert chat.cache.folder == tmp_path / ".cache" / "trl_vlm" / "answers" and chat.max_requests == 10_000
    chat = ChatOptions(endpoint=SERVER, cache=None, max_requests=None).chat("m")
    assert chat.cache is None and chat.max_requests is None


def test_max_completion_tokens_and_an_extra_body_reach_the_endpoint(tmp_path):
    options = ChatOptions(endpoint=SERVER, cache=None, max_completion_tokens=900, extra_body='{"top_p": 0.5}')
    settings = options.chat("m").settings
    assert settings["max_tokens"] is None
    assert settings["extra_body"] == {"top_p": 0.5, "max_completion_tokens": 900}


@pytest.mark.parametrize("text", ["{top_p: 1}", "[1]"])
def test_an_extra_body_that_is_no_json_object_is_refused(text):
    with pytest.raises(ValueError, match=r"`extra_body` is .*\{\"name\": value\}"):
        ChatOptions(extra_body=text)


def test_every_kind_of_judge_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_options, "RewardModelReward", lambda folder: lambda prompts, completions, **_: [folder])
    given = {
        "local": JudgeOptions(judge_model=str(saved("llava")), both_orders=False),
        "endpoint": JudgeOptions(endpoint=SERVER, judge_model="m", cache=None),
        "reward": JudgeOptions(reward_model="folder", min_gap=0.5),
        "claims": JudgeOptions(judge="claims", endpoint=SERVER, judge_model="m", cache=None),
    }
    assert given.keys() == JUDGES.keys()
    for name, options in given.items():
        judge, same = judge_of(options), judge_of(dataclasses.replace(options, judge=name))
        assert type(judge) is type(same)
        if name == "reward":
            assert isinstance(judge, RewardJudge) and judge.min_gap == 0.5 and judge.reward_func([], []) == ["folder"]
        elif name == "claims":
            assert isinstance(judge.checker.chat, EndpointChat)
        else:
            assert type(judge.chat) is {"local": LocalChat, "endpoint": EndpointChat}[name]
            assert judge.both_orders == options.both_orders


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "Set exactly one"),
        ({"judge_model": "m", "reward_model": "r"}, "Set exactly one"),
        (
            {"reward_model": "r", "reward_server": SERVER},
            r"`reward_model` \('r'\) and `reward_server` \(.*Set exactly one",
        ),
        ({"judge": "oracle"}, "`judge` is 'oracle'. It must be one of local, endpoint, reward, claims"),
        ({"judge": "endpoint", "judge_model": "m"}, "needs an address"),
        ({"judge": "local", "endpoint": SERVER, "judge_model": "m"}, "does not ask an endpoint"),
        ({"judge": "reward"}, "needs a reward model"),
        ({"judge": "local"}, "needs a model"),
    ],
)
def test_options_that_mean_no_judge_say_what_to_set(options, fault):
    with pytest.raises(ValueError, match=fault):
        judge_of(JudgeOptions(**options))


def test_a_reward_server_judges_once_it_has_answered():
    with running(make_app(Lengths(), ABOUT)) as server:
        options = JudgeOptions(reward_server=server.address, min_gap=0.5)
        row = {"prompt": [{"role": "user", "content": "What is it?"}], "images": [image(0)]}
        verdicts = judge_of(options).prefer([Comparison(row, "A cat.", "A black cat."), Comparison(row, "Yes", "No.")])
        assert [verdict.preferred for verdict in verdicts] == [1, None]
        assert options.further_settings() == {"reward served": ABOUT} and options.local_models() == []
    with pytest.raises(ConnectionError, match=f"No reward server answers at {server.address}"):
        judge_of(options)


def test_the_models_that_a_judge_loads_are_named_for_a_download():
    assert JudgeOptions(judge_model="m").local_models() == ["m"]
    assert JudgeOptions(reward_model="r").local_models() == ["r"]
    assert JudgeOptions(endpoint=SERVER, judge_model="m").local_models() == []
    assert JudgeOptions(judge="claims", judge_model="m", claim_writer="w").local_models() == ["m", "w"]
    assert [WriterOptions(writer_model="w", endpoint=at).local_models() for at in (None, SERVER)] == [["w"], []]


def test_scripts_read_the_same_options():
    (options,) = HfArgumentParser(JudgeOptions).parse_args_into_dataclasses(
        ["--endpoint", SERVER, "--judge_model", "m", "--max_requests", "7", "--extra_body", '{"top_p": 0.5}']
    )
    assert options == JudgeOptions(endpoint=SERVER, judge_model="m", max_requests=7, extra_body={"top_p": 0.5})


# Arguments of a judge whose option has another name, or that are no option: what the judge is made of.
NAMES = {
    "base_url": "endpoint",
    "model": "judge_model",
    "max_tokens": "max_answer_tokens",
    "max_new_tokens": "max_answer_tokens",
    "temperature": "answer_temperature",
    "batch_size": "chat_batch_size",
}
NO_OPTIONS = {"chat", "processor", "load_options", "whole_only", "reward_func"}


@pytest.mark.parametrize("kind", [EndpointChat, LocalChat, PairwiseJudge, RewardJudge])
def test_every_argument_of_a_judge_is_an_option(kind):
    options = {field.name for field in dataclasses.fields(JudgeOptions)}
    arguments = inspect.signature(kind).parameters.keys() - NO_OPTIONS
    assert arguments
    assert not [name for name in arguments if NAMES.get(name, name) not in options]


def test_every_option_of_an_endpoint_reaches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "a-key")
    given = {
        "key_variable": "JUDGE_KEY", "max_answer_tokens": 7, "answer_temperature": None, "extra_body": {"top_p": 0.5},
        "image_side": 99, "concurrency": 3, "timeout_seconds": 4.0, "retries": 2, "first_wait_seconds": 0.5,
        "max_requests": 11, "prompt_price": 1.5, "completion_price": 2.5, "cache": str(tmp_path),
    }  # fmt: skip
    made = ChatOptions(endpoint=SERVER, **given).chat("m")
    by_hand = EndpointChat(
        SERVER, "m", key_variable="JUDGE_KEY", max_tokens=7, temperature=None, extra_body={"top_p": 0.5},
        image_side=99, concurrency=3, timeout_seconds=4.0, retries=2, first_wait_seconds=0.5, max_requests=11,
        prompt_price=1.5, completion_price=2.5, cache=tmp_path,
    )  # fmt: skip
    apart = {"cache", "_lock", "_client", "_shown_at"}
    assert {k: v for k, v in vars(made).items() if k not in apart} == {
        k: v for k, v in vars(by_hand).items() if k not in apart
    }
    assert made.cache.folder == by_hand.cache.folder and vars(made._client) == vars(by_hand._client)
    standard = ChatOptions(endpoint=SERVER, cache=None)
    assert not [name for name, value in given.items() if name != "cache" and getattr(standard, name) == value]


@pytest.mark.parametrize("words", [["pairs", "judged"], ["evaluate"], ["evaluate", "judges"], ["online-dpo"]])
def test_every_option_is_a_flag_of_every_command_that_asks_a_judge(words, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        parser().parse_args([*words, "--help"])
    shown = capsys.readouterr().out.replace("-", "_")
    owner = ChatOptions if words == ["evaluate"] else JudgeOptions  # benchmarks ask one question, with one reply
    assert not [field.name for field in dataclasses.fields(owner) if f"__{field.name}" not in shown]


def test_a_temperature_can_be_left_out_by_flag_and_by_file(tmp_path):
    given = ["pairs", "judged", "--input", "x", "--output", "y", "--model", "m", "--answer-temperature", "none"]
    assert parser().parse_args(given).answer_temperature is None
    file = tmp_path / "judge.yaml"
    file.write_text("answer_temperature: null\n")
    script, *_ = options_of(online_dpo.make_parser(), ["--config", str(file), "--output_dir", str(tmp_path)])
    assert script.answer_temperature is None
