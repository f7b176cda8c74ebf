import json
import os
import subprocess
import sys

import huggingface_hub
import pytest

from tests.distributed import ROOT
from tests.evaluation.helpers import mmhal_folder, write_json
from tests.evaluation.pair_helpers import pairs_file, reward_folder
from tests.judges.helpers import endpoint, said, with_usage
from trl_vlm.cli import main as cli


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """huggingface_hub refuses every request while it is offline, also those to this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def pairs(tmp_path):
    return pairs_file(tmp_path / "held.jsonl")


def judges(pairs, *more):
    return cli.main(["evaluate", "judges", "--datasets", str(pairs), *map(str, more)])


def at(server, tmp_path, *more):
    """The options of an endpoint that is asked one question after the other.

    Rows 0 and 1 hold the same replies about one image, so that their questions are the same: twelve are sent.
    """
    where = ["--endpoint", server.url, "--judge-model", "big"]
    return [*where, "--cache", tmp_path / "cache", "--concurrency", "1", *more]


def test_accuracy_flips_and_costs_of_a_judge_are_shown(pairs, tmp_path, capsys):
    with endpoint(lambda body, count: with_usage(said("It is true.\nBetter: 1"))) as server:
        assert judges(pairs, *at(server, tmp_path), "--out", tmp_path / "out") == 0
        text = capsys.readouterr().out
        assert "| metric | big, prompt " in text and "| undecided: the order decides (%) ↓ | 87.5" in text
        assert "| requests sent | 12 |" in text and "| tokens of requests | 1200 |" in text
        assert "| tokens of answers | 84 |" in text and str(tmp_path / "out" / "judges.md") in text
        asked = len(server.bodies)
        assert judges(pairs, *at(server, tmp_path), "--json") == 0
        assert len(server.bodies) == asked, "a second run asks the cache"
        (result,) = json.loads(capsys.readouterr().out)
        assert result["metrics"]["from_cache"] == 14 and result["judge"]["name"] == "big"
        assert result["served"] == [] and "accuracy_in_objects" in result["metrics"]


def test_one_order_and_two_are_two_judges(pairs, tmp_path, capsys):
    with endpoint(lambda body, count: said("Better: 1")) as server:
        for more in ([], ["--no-both-orders"]):
            assert judges(pairs, *at(server, tmp_path), "--out", tmp_path / "out", *more) == 0
    results = json.loads((tmp_path / "out" / "judges.json").read_text())["results"]
    assert len({result["judge"]["template"] for result in results}) == 2
    assert "order_flips" not in results[1]["metrics"] and results[1]["metrics"]["undecided"] == 1 / 8


def test_a_judge_that_checks_claims_is_measured(pairs, tmp_path):
    with endpoint(lambda body, count: said("No" if "A cat" in str(body["messages"]) else "Yes")) as server:
        given = at(server, tmp_path, "--judge", "claims", "--out", tmp_path / "out")
        assert judges(pairs, *given) == 0 and judges(pairs, *given, "--claim-threshold", "0.4") == 0
    first, second = json.loads((tmp_path / "out" / "judges.json").read_text())["results"]
    assert first["metrics"]["accuracy_decided"] == 4 / 6 and first["metrics"]["neither"] == 2 / 8
    assert "order_flips" not in first["metrics"]
    assert first["judge"]["template"] != second["judge"]["template"]


@pytest.mark.slow
def test_a_reward_model_is_measured_as_a_judge(pairs, tmp_path):
    folder = reward_folder(tmp_path / "rm")
    assert judges(pairs, "--reward-model", folder, "--out", tmp_path / "out") == 0
    (result,) = json.loads((tmp_path / "out" / "judges.json").read_text())["results"]
    assert result["judge"]["name"] == str(folder) and result["metrics"]["neither"] == 1 / 8


def test_an_unreachable_judge_is_found_before_images_are_read_or_anything_is_written(
    pairs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("trl_vlm.evaluation.known_pairs.image_digest", None)
    options = ["--endpoint", "http://127.0.0.1:9/v1", "--judge-model", "big", "--retries", "0"]
    assert judges(pairs, *options, "--output", tmp_path / "out") == 1
    assert "gave no answer to any of 1 requests" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_endpoint_that_changes_its_name_is_stopped(pairs, tmp_path, capsys):
    def renamed(body, count):
        reply = said("Better: 1")
        model = "gpt-4" if "A dog." in body["messages"][0]["content"][-1]["text"] else "gpt-4o"
        return reply._replace(body=json.dumps({**json.loads(reply.body), "model": model}).encode())

    with endpoint(renamed) as server:
        assert judges(pairs, *at(server, tmp_path), "--output", tmp_path / "out") == 1
    assert "the judge called itself 'gpt-4' and 'gpt-4o'" in capsys.readouterr().err
    verdicts = next((tmp_path / "out").rglob("verdicts.*.jsonl")).read_text()
    assert len(verdicts.splitlines()) == 8, "nothing that was paid for is lost"


def test_answers_cut_by_the_token_limit_are_counted(pairs, tmp_path, capsys):
    with endpoint(lambda body, count: said("I think that", "length")) as server:
        assert judges(pairs, *at(server, tmp_path)) == 0
    assert "| undecided: cut off at the longest answer (%) ↓ | 87.5" in capsys.readouterr().out


def test_a_cap_on_requests_ends_the_run_with_a_sentence_and_it_goes_on(pairs, tmp_path, capsys):
    with endpoint(lambda body, count: said("Better: 2")) as server:
        options = [*at(server, tmp_path), "--output", tmp_path / "out"]
        assert judges(pairs, *options, "--max-requests", "5") == 1
        assert "as many as `max_requests` allows" in capsys.readouterr().err
        assert judges(pairs, *options) == 0
        assert len(server.bodies) == 1 + 12, "one to see whether somebody is there; no question is asked twice"
    assert "| requests sent | 12 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["judges", "--judge-model", "x"], "nothing is given to judge"),
        (["judges", "--datasets", "{pairs}"], "Set exactly one of `judge_model`, `reward_model` and `reward_server`"),
        (["judges", "--datasets", "{pairs}", "--judge", "local"], "needs a model. Set `--judge-model`"),
        (["judges", "--datasets", "{pairs}", "--reward-model", "./gone"], "there is no folder './gone'"),
        (["judges", "--responses", "gone", "--judge-model", "x"], "no file of responses at 'gone'"),
        (["judges", "--responses", "gone", "--reward-model", "x"], "set `--judge-model`"),
        (["./judges", "--tasks", "pope", "--output", "o"], "there is no"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(pairs, capsys, words, message):
    assert cli.main(["evaluate", *(word.replace("{pairs}", str(pairs)) for word in words)]) == 1
    assert message in capsys.readouterr().err


def test_published_responses_are_rated_and_ranked(tmp_path, capsys):
    data = mmhal_folder(tmp_path / "data")
    published = json.loads((data / "mmhal" / "response_template.json").read_text())
    for model in ("one", "two", "three"):
        write_json(tmp_path / "responses" / f"{model}.json", [{**r, "model_answer": model} for r in published])
    write_json(tmp_path / "scores.json", {"one": 1.5, "two": 1.8, "three": 2.1})

    def rate(body, count):
        text = body["messages"][0]["content"][-1]["text"]
        return said(
            f"Rating: {next((n for n, word in enumerate(['one', 'two', 'three'], 1) if word in text[-300:]), 0)}"
        )

    options = ["--responses", tmp_path / "responses", "--published", tmp_path / "scores.json", "--data", data]
    with endpoint(rate) as server:
        words = ["evaluate", "judges", *map(str, [*options, *at(server, tmp_path), "--output", tmp_path / "out"])]
        assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "| models | 3 | 1.00" in text and "| three | 2.10 | 3.00 |" in text and "judge: big, prompt " in text


@pytest.mark.distributed
def test_two_processes_share_the_questions_and_report_once(pairs, tmp_path):
    with endpoint(lambda body, count: with_usage(said("Better: 1"))) as server:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [
            "-m",
            "trl_vlm.cli",
            "evaluate",
            "judges",
            "--datasets",
            str(pairs),
            "--output",
            str(tmp_path / "out"),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [*launcher, *command, *map(str, at(server, tmp_path, "--output", tmp_path / "out"))],
            check=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.stdout.count("# Judges") == 1
    (result,) = json.loads((tmp_path / "out" / "judges.json").read_text())["results"]
    assert result["metrics"]["order_flips"] == 7 / 8 and result["served"] == ["judge"]
    assert result["metrics"]["requests"] + result["metrics"].get("from_cache", 0) == 14
    assert result["metrics"]["prompt_tokens"] == 100 * result["metrics"]["requests"]
    assert len(list((tmp_path / "out").rglob("verdicts.*.jsonl"))) == 2
