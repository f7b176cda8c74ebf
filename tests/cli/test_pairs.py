import dataclasses
import json
from inspect import signature

import datasets
import pytest

from tests.families import image, saved
from tests.judges.helpers import endpoint, said, with_usage
from tests.rewards.helpers import Lengths, running
from trl_vlm.cli import main as cli
from trl_vlm.cli import pairs as pairs_cli
from trl_vlm.cli.parsing import flag_of, made_of
from trl_vlm.judges import EndpointChat, LocalChat, SpendingCapReached
from trl_vlm.pairs import COMPOSED_SOURCES, SOURCES, SentenceEncoder, source_class
from trl_vlm.pairs.vllm import VLLMSampling
from trl_vlm.rewards.server import make_app


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
    common = ["--input", str(world / "rows.jsonl"), "--output", str(world / "out"), "--images", str(world)]
    model = ["--model", str(saved("llava", sharp=4))] if source_class(method).needs_policy else []
    return ["pairs", method, *common, *model, *more]


def source(world, method, *more):
    return made_of(source_class(method), cli.parser().parse_args(arguments(world, method, *more)))


def option_fields(owner):
    """The fields of a source that are options, those of nested options in the place of their field."""
    for field in dataclasses.fields(owner):
        if field.init and "options" in field.metadata:
            yield from option_fields(field.metadata["options"])
        elif field.init:
            yield field


REQUIRED = {"corrupted": ["--writer-model", "w"]}


@pytest.mark.parametrize("method", SOURCES)
def test_every_field_of_a_source_is_an_option_with_its_default_and_there_is_no_other(world, method):
    """Fails for a constructor argument without a flag, and for a flag with a default of its own."""
    options = vars(cli.parser().parse_args(arguments(world, method, *REQUIRED.get(method, []))))
    kind = source_class(method)
    defaults = {flag_of(field): field.default for field in option_fields(kind)}
    assert {field.name for field in dataclasses.fields(kind) if field.init} == set(signature(kind).parameters)
    assert {name: options[name] for name in defaults if defaults[name] is not dataclasses.MISSING} == {
        name: default for name, default in defaults.items() if default is not dataclasses.MISSING
    }
    wanted = COMMON | ({"model", "dtype"} if kind.needs_policy else set())
    if getattr(kind, "samples_elsewhere", False):
        wanted |= {field.name for field in dataclasses.fields(VLLMSampling)}
    assert options.keys() - defaults.keys() == wanted


COMMON = {"input", "output", "split", "config", "revision", "data_files", "images", "embed_images", "limit"}
COMMON |= {"batch_size", "block_rows", "skip_bad", "overwrite", "json", "method", "run", "push_to_hub", "private"}


@pytest.mark.parametrize("name", [*SOURCES, *COMPOSED_SOURCES])
def test_a_source_has_one_name_for_the_registry_the_command_and_the_column(name):
    assert source_class(name).name == name
    assert all(field.metadata["help"] for field in dataclasses.fields(source_class(name)) if field.init)


def test_an_unknown_source_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="There is no pair source 'bhds'. Known are bdhs, povid"):
        source_class("bhds")


def test_the_options_reach_the_sources(world):
    sampling = ["--temperature", "0.5", "--max-new-tokens", "7", "--seed", "3"]
    own = ["--mask-ratio", "0.5", "--noise-steps", "20", "--iterations", "2", "--threshold", "0.4", "--encoder", "e"]
    bdhs = source(
        world, "bdhs", *sampling, *own, "--max-sentence-tokens", "5", "--per-sentence", "--noise-overflow", "clip"
    )
    assert (bdhs.mask_ratio, bdhs.noise_steps, bdhs.iterations, bdhs.threshold) == (0.5, 20, 2, 0.4)
    assert (bdhs.temperature, bdhs.max_new_tokens, bdhs.seed, bdhs.max_sentence_tokens) == (0.5, 7, 3, 5)
    assert bdhs.guided and bdhs.similarity.encoder == "e" and bdhs.similarity.per_sentence
    assert bdhs.noise_overflow == "clip"
    assert not source(world, "bdhs", "--no-guided").guided
    assert source(world, "bdhs", "--max-image-pixels", "none", "--noise-steps", "none").max_image_pixels is None
    povid = source(world, "povid", "--noise-steps", "20", "--indexing", "paper", "--keep-rejected", "--seed", "4")
    assert (povid.noise_steps, povid.indexing, povid.keep_rejected, povid.seed) == (20, "paper", True, 4)
    samples = source(world, "self-samples", *sampling)
    assert (samples.temperature, samples.max_new_tokens, samples.seed) == (0.5, 7, 3)


def test_a_judge_behind_an_address_gets_its_options(world):
    where = ["--endpoint", "http://localhost:1/v1", "--max-requests", "9", "--cache", str(world), "--retries", "2"]
    judged = source(world, "judged", "--seed", "3", *where, "--judge-model", "j", "--replies", "3", "--no-both-orders")
    assert (judged.replies, judged.seed) == (3, 3)
    assert isinstance(judged.judge.chat, EndpointChat) and not judged.judge.both_orders
    assert (judged.judge.chat.max_requests, judged.judge.chat.retries, judged.judge.chat.model) == (9, 2, "j")
    corrupted = source(world, "corrupted", *where, "--writer-model", "w", "--show-images")
    assert (corrupted.chat.model, corrupted.show_images) == ("w", True)


def test_a_judge_on_this_machine_needs_no_endpoint(world):
    judged = source(world, "judged", "--judge-model", str(saved("llava")), "--show-ground-truth")
    assert isinstance(judged.judge.chat, LocalChat)
    assert judged.judge.show_ground_truth and judged.judge.both_orders


def test_a_reward_server_judges_and_the_pairs_remember_what_it_served_and_not_where(world, capsys):
    asked = ["--max-new-tokens", "4", "--overwrite", "--json"]

    def settings(model):
        with running(make_app(Lengths(), {"model": model, "revision": None, "template": {}})) as server:
            given = arguments(world, "judged", "--reward-server", server.address, *asked)
            assert cli.main(given) == 0
            return pairs_cli.settings(cli.parser().parse_args(given))

    first = settings("one")
    assert json.loads(capsys.readouterr().out)["pairs"] > 0
    rows = datasets.load_dataset(str(world / "out"), split="train", cache_dir=str(world / "cache"))
    lengths = [[len(row[side][0]["content"]) for side in ("chosen", "rejected")] for row in rows]
    assert all(chosen > rejected for chosen, rejected in lengths)  # it scores a reply by its length
    assert first == settings("one") != settings("two")
    capsys.readouterr()
    assert cli.main(arguments(world, "judged", "--reward-server", "http://127.0.0.1:9")) == 1
    assert "error: No reward server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_earlier_names_of_methods_and_options_are_understood(world):
    old = ["--dataset", str(world / "rows.jsonl"), "--out", str(world / "out"), "--model", "m"]
    parse = cli.parser().parse_args
    bdhs = parse(["pairs", "bdhs", *old, "--mask-share", "0.5", "--unguided"])
    assert (bdhs.input, bdhs.output) == (str(world / "rows.jsonl"), str(world / "out"))
    assert (bdhs.mask_ratio, bdhs.guided) == (0.5, False)
    assert parse(["pairs", "povid", *old, "--overflow", "clip"]).noise_overflow == "clip"
    judged = parse(["pairs", "judge", *old, "--judge-model", "j", "--one-order", "--answer-tokens", "9"])
    assert (judged.method, judged.both_orders, judged.max_answer_tokens) == ("judged", False, 9)
    assert parse(["pairs", "samples", *old]).method == "self-samples"
    assert parse(["pairs", "corrupt", *old[:4], "--writer-model", "w"]).method == "corrupted"


def test_bdhs_from_the_command_line_keeps_what_happened(world, monkeypatch, capsys):
    monkeypatch.setattr(SentenceEncoder, "__call__", lambda self, texts, others: [0.5] * len(texts))
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
    assert cli.main(arguments(world, "self-samples")) == 1
    assert "The launcher started 2 processes, and accelerate knows of 1" in capsys.readouterr().err


def test_settings_that_change_no_pair_do_not_stop_a_run_from_going_on(world):
    asked = ["--endpoint", "http://localhost:1/v1", "--judge-model", "j"]
    parse = cli.parser().parse_args
    settings = pairs_cli.settings(parse(arguments(world, "judged", *asked)))
    other_ways = ["--cache", "none", "--max-requests", "5", "--concurrency", "2", "--retries", "1", "--limit", "3"]
    other_ways += ["--key-variable", "KEY", "--batch-size", "2", "--block-rows", "7", "--timeout-seconds", "3"]
    assert pairs_cli.settings(parse(arguments(world, "judged", *asked, *other_ways))) == settings
    for other_pairs in (["--replies", "3"], ["--seed", "1"], ["--no-both-orders"], ["--max-answer-tokens", "9"]):
        assert pairs_cli.settings(parse(arguments(world, "judged", *asked, *other_pairs))) != settings
    json.dumps(settings)


def test_the_help_of_a_method_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pairs", "bdhs", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Expected share of hidden image tokens, 0 to 1 (default: 0.99)" in text
    assert "--mask-share" not in text and "--unguided" not in text


def test_a_spending_cap_ends_the_command_with_its_message(world, monkeypatch, capsys):
    def refuse(*_, **__):
        raise SpendingCapReached("5 requests were sent")

    monkeypatch.setattr("trl_vlm.pairs.writer.PairWriter.write", refuse)
    ask = ["--endpoint", "http://localhost:1/v1", "--judge-model", "j", "--cache", "none"]
    assert cli.main(arguments(world, "judged", *ask)) == 1
    assert capsys.readouterr().err.endswith("error: 5 requests were sent\n")


def test_what_an_endpoint_cost_is_shown_when_its_pairs_are_there(world, capsys):
    spent = "endpoint: 3 requests, 6,000 + 1,500 tokens, cost 0.03\n"
    for text, code in (("A square.", 1), ("<rewritten>A blue square. It is on a wall.</rewritten>", 0)):
        with endpoint(lambda *_, text=text: with_usage(said(text), 2000, 500)) as server:
            asked = ["--endpoint", server.url, "--writer-model", "w", "--cache", "none", "--overwrite"]
            prices = ["--prompt-price", "2.5", "--completion-price", "10"]
            assert cli.main(arguments(world, "corrupted", *asked, *prices)) == code
        shown = capsys.readouterr()
        assert spent in (shown.err if code else shown.out)  # also where no answer made a pair
