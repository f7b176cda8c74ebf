import json

import datasets
import pytest

from tests.families import image, saved
from trl_vlm.cli import main as cli
from trl_vlm.cli import pairs as pairs_cli
from trl_vlm.judges import EndpointChat, LocalChat, RewardJudge


@pytest.fixture
def world(tmp_path):
    image(0).save(tmp_path / "0.png")
    row = {
        "images": ["0.png"],
        "prompt": [{"role": "user", "content": "What is it?"}],
        "completion": [{"role": "assistant", "content": "A red square. It is on a wall."}],
    }
    (tmp_path / "rows.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    return tmp_path


def arguments(world, method, *more):
    common = ["--dataset", str(world / "rows.jsonl"), "--out", str(world / "out"), "--images", str(world)]
    model = ["--model", str(saved("llava", sharp=4))] if pairs_cli.COMMANDS[method].needs_policy else []
    return ["pairs", method, *common, *model, *more]


def source(world, method, *more):
    return pairs_cli.COMMANDS[method].source(cli.parser().parse_args(arguments(world, method, *more)))


def test_the_options_reach_the_sources(world):
    sampling = ["--temperature", "0.5", "--max-new-tokens", "7", "--seed", "3"]
    endpoint = ["--endpoint", "http://localhost:1/v1", "--max-requests", "9", "--cache", str(world), "--retries", "2"]
    own = ["--mask-share", "0.5", "--noise-steps", "20", "--iterations", "2", "--threshold", "0.4", "--encoder", "e"]
    found = source(world, "bdhs", *sampling, *own, "--max-sentence-tokens", "5", "--per-sentence")
    assert (found.mask_share, found.noise_steps, found.iterations, found.threshold) == (0.5, 20, 2, 0.4)
    assert (found.temperature, found.max_new_tokens, found.seed, found.max_sentence_tokens) == (0.5, 7, 3, 5)
    assert found.guided and found.similarity.encoder == "e" and found.similarity.per_sentence
    assert not source(world, "bdhs", "--unguided").guided
    noise = ["--noise-steps", "20", "--indexing", "paper", "--overflow", "clip", "--keep-rejected", "--seed", "4"]
    found = source(world, "povid", *noise)
    assert (found.noise_steps, found.indexing, found.overflow, found.keep_rejected) == (20, "paper", "clip", True)
    assert found.seed == 4
    found = source(world, "judge", *sampling, *endpoint, "--judge-model", "j", "--replies", "3", "--one-order")
    assert (found.replies, found.temperature, found.max_new_tokens, found.seed) == (3, 0.5, 7, 3)
    assert isinstance(found.judge.chat, EndpointChat) and not found.judge.both_orders
    assert (found.judge.chat.max_requests, found.judge.chat.retries, found.judge.chat.model) == (9, 2, "j")
    found = source(world, "judge", "--judge-model", str(saved("llava")), "--show-ground-truth")
    assert isinstance(found.judge.chat, LocalChat) and found.judge.show_ground_truth and found.judge.both_orders
    found = source(world, "corrupt", *endpoint, "--writer-model", "w", "--show-images")
    assert (found.chat.model, found.show_images) == ("w", True)
    found = source(world, "samples", *sampling)
    assert (found.temperature, found.max_new_tokens, found.seed) == (0.5, 7, 3)


def test_a_reward_model_judges(world, monkeypatch):
    monkeypatch.setattr(pairs_cli, "RewardModelReward", lambda folder: lambda prompts, completions, **_: [folder])
    found = source(world, "judge", "--reward-model", "folder")
    assert isinstance(found.judge, RewardJudge)
    assert found.judge.reward_func([], []) == ["folder"]


def test_bdhs_from_the_command_line_keeps_what_happened(world, monkeypatch, capsys):
    monkeypatch.setattr(pairs_cli, "SentenceEncoder", lambda *_, **__: lambda texts, others: [0.5] * len(texts))
    assert cli.main(arguments(world, "bdhs", "--max-sentence-tokens", "3", "--iterations", "2", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["pairs"]) == (3, 3)
    rows = datasets.load_dataset(str(world / "out"), split="train", cache_dir=str(world / "cache"))
    assert set(rows["pair_source"]) == {"bdhs"} and set(rows["pair_iterations"]) == {1}
    assert set(rows["pair_similarity"]) == {0.5} and all(rows["pair_guided"])
    assert len(set(rows["rejected"][place][0]["content"] for place in range(3))) > 1  # one prompt, three draws
    assert "| 1 | 3 | 100.0% | 100.0% |" in (world / "out" / "README.md").read_text()


def test_processes_that_accelerate_does_not_know_are_an_error(world, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(arguments(world, "samples")) == 1
    assert "The launcher started 2 processes, and accelerate knows of 1" in capsys.readouterr().err


def test_settings_that_change_no_pair_do_not_stop_a_run_from_going_on(world):
    names = set(vars(cli.parser().parse_args(arguments(world, "judge"))))
    assert names >= pairs_cli.NOT_ABOUT_THE_PAIRS
    assert names >= pairs_cli.SOURCE_OPTIONS
