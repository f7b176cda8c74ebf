"""The writer of pairs; several runs and processes are forks of this one, which have everything imported already."""

import json
import os
import random
import re
import signal
import socket
import time
from collections import Counter
from contextlib import nullcontext

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from accelerate import PartialState

from tests.families import build, image, saved
from tests.forks import finished, fork, fork_group
from trl_vlm.cli import main as cli
from trl_vlm.data.converters import Source
from trl_vlm.data.errors import RowError
from trl_vlm.data.io.card import histogram, statistics
from trl_vlm.data.io.shards import give_one_schema
from trl_vlm.models.generation import Policy, generating
from trl_vlm.pairs.samples import SelfSamples
from trl_vlm.pairs.source import Deferred, finish_pairs
from trl_vlm.pairs.writer import BAD_ROW, NO_PAIR, PairWriter, features_of

ROWS = 23


@pytest.fixture(scope="module")
def policy():
    return Policy(*build("llava", sharp=4))


@pytest.fixture
def world(tmp_path):
    """Rows with none, one and several images, as JSON Lines beside their images."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        image(number).save(tmp_path / "images" / f"{number}.png")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(ROWS):
            row = {
                "images": [f"{place}.png" for place in range(number % 3)],
                "prompt": [{"role": "user", "content": f"What is it? {number}"}],
                "completion": [{"role": "assistant", "content": f"A red square, {number}."}],
                "id": number,
            }
            file.write(json.dumps(row) + "\n")
    return tmp_path


class Slow:
    """A source that takes its time, and now and then gives no pair."""

    def __init__(self, seconds=0.0):
        self.source, self.seconds, self.seen = SelfSamples(max_new_tokens=3), seconds, []

    def __call__(self, rows, policy, round=0):
        time.sleep(self.seconds * len(rows))
        self.seen += [row["row_name"] for row in rows]
        made = self.source(rows, policy, round)
        return [
            None
            if row["id"] % 7 == 3
            else {**pair, "pair_similarity": row["id"] / ROWS, "pair_iterations": row["id"] % 3}
            for row, pair in zip(rows, made, strict=True)
        ]


def make(world, policy, output="out", source=None, settings=None, limit=None, **options):
    options = {"batch_size": 3, "block_rows": 4, "progress": False, "images": world / "images", **options}
    writer = PairWriter(source or Slow(), policy, world / output, settings or {"seed": 0}, **options)
    with nullcontext() if policy is None else generating(policy.model):
        return writer.write(Source(str(world / "rows.jsonl")), limit=limit)


def rows_of(path):
    kind = {".jsonl": "json", ".parquet": "parquet"}.get(path.suffix)
    data = {"path": kind, "data_files": str(path)} if kind else {"path": str(path)}
    rows = datasets.load_dataset(**data, split="train", cache_dir=str(path.parent / "cache"))
    return list(rows.cast_column("images", datasets.List(datasets.Image(decode=False))) if kind != "json" else rows)


def test_pairs_are_written_in_the_order_of_the_rows_and_the_rest_is_counted(world, policy):
    report = make(world, policy)
    rows = rows_of(world / "out")
    left_out = [number for number in range(ROWS) if number % 7 == 3]
    assert [row["id"] for row in rows] == [number for number in range(ROWS) if number not in left_out]
    assert (report.rows, report.pairs, report.dropped) == (ROWS, ROWS - len(left_out), {NO_PAIR: len(left_out)})
    assert [len(row["images"]) for row in rows] == [row["id"] % 3 for row in rows]
    assert rows[1]["images"][0]["path"] == str(world / "images" / "0.png")
    assert rows[0]["pair_source"] == "self-samples" and "row_name" not in rows[0]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "A red square, 0."}]
    assert not (world / "out.partial").exists()


@pytest.mark.parametrize(
    "options", [{"batch_size": 5}, {"block_rows": 100, "batch_size": 1}, {"output": "out.parquet"}]
)
def test_batch_size_blocks_and_form_change_no_row(world, policy, options):
    make(world, policy, output="plain")
    make(world, policy, **{"output": "other", **options})
    assert rows_of(world / options.get("output", "other")) == rows_of(world / "plain")


class Leaving:
    """A source that leaves odd rows for later, and some of them without a pair."""

    def __init__(self):
        self.dropped, self.finished = Counter(), []

    def begin(self, rows, policy, round=0):
        if any(row["id"] == 4 for row in rows) and len(rows) > 1:
            raise RowError("row 4: it is bad beside others")
        return [Deferred(self._finished, row) if row["id"] % 2 else self.pair(row) for row in rows]

    def __call__(self, rows, policy, round=0):
        return finish_pairs(self.begin(rows, policy, round), policy)

    def _finished(self, rows, policy):
        self.finished.append([row["id"] for row in rows])
        return [self.pair(row) for row in rows]

    def pair(self, row):
        if row["id"] % 5 == 1:
            self.dropped["no idea"] += 1
            return None
        return {**row, "chosen": row["completion"], "rejected": row["completion"], "pair_source": "leaving"}


def test_what_a_source_leaves_for_later_is_finished_over_batches_and_keeps_its_place(world, policy):
    source = Leaving()
    report = make(world, policy, source=source, batch_size=3, block_rows=20, skip_bad=True)
    assert source.finished == [[1, 3, 5], [7, 9, 11], [13, 15, 17], [19], [21]]  # and at the end of each block
    assert [row["id"] for row in rows_of(world / "out")] == [number for number in range(ROWS) if number % 5 != 1]
    assert report.dropped == {"no idea": sum(number % 5 == 1 for number in range(ROWS))}


def test_json_lines_hold_paths(world, policy):
    make(world, policy, output="rows_out.jsonl")
    first = json.loads((world / "rows_out.jsonl").read_text().splitlines()[1])
    assert first["images"] == [str(world / "images" / "0.png")]
    assert "pairs of 23 rows" in (world / "rows_out.md").read_text()
    with pytest.raises(ValueError, match="JSON Lines cannot hold the bytes of images"):
        make(world, policy, output="more.jsonl", embed_images=True)


def test_images_can_be_embedded(world, policy):
    make(world, policy, embed_images=True, limit=3)
    embedded = rows_of(world / "out")[1]["images"][0]
    assert embedded["bytes"] == (world / "images" / "0.png").read_bytes()


def test_a_run_killed_at_three_random_moments_ends_with_the_rows_of_one_that_was_not(world, policy):
    make(world, policy, output="whole", block_rows=2)
    seen = world / "seen.txt"

    class Watched(Slow):
        def __call__(self, rows, policy, round=0):
            with seen.open("a") as file:
                file.writelines(f"{row['row_name']}\n" for row in rows)
            return super().__call__(rows, policy, round)

    def work():
        make(world, policy, block_rows=2, source=Watched(seconds=0.02))

    kills = 0
    moments = random.Random(5)
    while kills < 3:
        before = seen.read_text().count("\n") if seen.exists() else 0
        child = fork(work)
        # At a random moment after a random number of rows, so that a slow machine changes nothing.
        rows = moments.randint(1, 6)
        while (seen.read_text().count("\n") if seen.exists() else 0) < before + rows:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert finished(child) == -signal.SIGKILL
        kills += 1
        assert not (world / "out").exists()
    child = fork(work)
    assert finished(child) == 0
    assert rows_of(world / "out") == rows_of(world / "whole")
    counted = [
        re.search(r"^\d+ pairs of \d+ rows", (world / out / "README.md").read_text(), re.MULTILINE)[0]
        for out in ("out", "whole")
    ]
    assert counted[0] == counted[1]
    tried = seen.read_text().split("\n")[:-1]
    assert set(tried) == {f"row {number}" for number in range(ROWS)}
    assert ROWS < len(tried) <= ROWS + 3 * 3  # what a kill costs is the block that it came in


def test_a_kill_while_columns_are_made_equal_loses_nothing(world, policy, monkeypatch):
    make(world, policy, output="whole")

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_vlm.pairs.writer.write_card", dies)
    with pytest.raises(KeyboardInterrupt):
        make(world, policy)
    monkeypatch.undo()
    source = Slow()
    report = make(world, policy, source=source)
    assert source.seen == [] and report.pairs == 20
    assert rows_of(world / "out") == rows_of(world / "whole")


@pytest.mark.distributed
def test_two_processes_make_the_rows_of_one(world, policy):
    make(world, policy, output="alone")

    def work():
        state = PartialState(cpu=True)
        source = Slow()
        try:
            report = make(world, policy, source=source)
        finally:
            state.destroy_process_group()
        assert (report is None) == (state.process_index == 1)
        (world / f"seen-{state.process_index}.json").write_text(json.dumps([state.num_processes, source.seen]))

    assert fork_group(work) == [0, 0]
    (size, first), (_, second) = (json.loads((world / f"seen-{rank}.json").read_text()) for rank in range(2))
    assert size == 2 and len(first) == 12 and len(second) == 11 and not set(first) & set(second)
    assert rows_of(world / "out") == rows_of(world / "alone")


def test_other_settings_do_not_go_on_with_an_unfinished_run(world, policy):
    class Dies(Slow):
        def __call__(self, rows, policy, round=0):
            if rows[0]["id"] > 10:
                raise KeyboardInterrupt
            return super().__call__(rows, policy, round)

    with pytest.raises(KeyboardInterrupt):
        make(world, policy, source=Dies())
    with pytest.raises(ValueError, match=r"unfinished conversion that differs in \['seed'\]"):
        make(world, policy, settings={"seed": 1})
    make(world, policy, settings={"seed": 1}, overwrite=True)
    with pytest.raises(FileExistsError, match="exists"):
        make(world, policy)


def test_bad_rows_are_named_or_left_out_and_counted(world, policy):
    (world / "images" / "1.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="row 2: not an image"):
        make(world, policy)
    report = make(world, policy, output="good", skip_bad=True)
    bad = [number for number in range(ROWS) if number % 3 == 2]
    assert report.dropped[BAD_ROW] == len(bad)
    assert not set(bad) & {row["id"] for row in rows_of(world / "good")}


def test_reasons_of_the_source_are_counted_even_beside_bad_rows(world, policy):
    lines = (world / "rows.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace("A red square, 1.", "")
    (world / "rows.jsonl").write_text("\n".join(lines))
    source = SelfSamples(max_new_tokens=2)
    with pytest.raises(ValueError, match="row 1, column 'completion': the reply is empty"):
        make(world, policy, source=source)
    source = SelfSamples(max_new_tokens=2)
    real = source._pair
    source._pair = lambda row, reference, sample: (
        source.dropped.update(["odd"]) if row["id"] % 2 else real(row, reference, sample)
    )
    report = make(world, policy, output="left", source=source, skip_bad=True)
    assert report.dropped == {BAD_ROW: 1, "odd": 10}


class Counting(Slow):
    """A source that gives a pair for every row."""

    def __call__(self, rows, policy, round=0):
        time.sleep(self.seconds * len(rows))
        self.seen += [row["row_name"] for row in rows]
        return [
            {**row, "chosen": row["completion"], "rejected": row["completion"], "pair_n": row["id"]} for row in rows
        ]


def test_a_shard_that_was_damaged_is_made_again_and_no_other(world):
    def dies(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trl_vlm.pairs.writer.write_card", dies)
        make(world, None, source=Counting())
    for number in (1, 4):
        (world / "out.partial" / f"train-{number:05d}.parquet").write_bytes(b"")
    source = Counting()
    report = make(world, None, source=source, block_rows=3)
    assert source.seen == [f"row {number}" for number in (*range(4, 8), *range(16, 20))]
    assert report.pairs == report.rows == ROWS
    assert [row["id"] for row in rows_of(world / "out")] == list(range(ROWS))


def test_bad_values_of_a_row_are_left_out_and_errors_of_the_source_are_not(world):
    lines = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    lines[4]["images"] = "1.png"
    lines[5]["images"] = [3]
    (world / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(TypeError, match="row 4: 'images' is a str"):
        make(world, None, source=Counting())
    assert make(world, None, source=Counting(), skip_bad=True).dropped == {BAD_ROW: 2}

    class Broken(Counting):
        def __call__(self, rows, policy, round=0):
            raise ValueError("the server is away")

    with pytest.raises(ValueError, match="the server is away"):
        make(world, None, output="other", source=Broken(), skip_bad=True)


def test_a_second_run_on_one_output_says_who_writes_it_and_a_killed_one_holds_nothing(world):
    child = fork(lambda: make(world, None, source=Counting(seconds=5)))
    deadline = time.monotonic() + 60
    while not (world / ".out.lock").exists() or not (world / ".out.lock").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(OSError, match=f"is being written by another run: process {child} on {socket.gethostname()}"):
        make(world, None, source=Counting())
    os.kill(child, signal.SIGKILL)
    finished(child)
    assert make(world, None, source=Counting()).pairs == ROWS
    assert not (world / ".out.lock").exists()


def test_an_output_that_cannot_be_written_is_found_before_the_first_row(world):
    (world / "file").write_text("")
    source = Counting()
    with pytest.raises(OSError, match="Nothing can be written to .*file"):
        make(world, None, output="file/out", source=source)
    assert not source.seen


def test_no_pair_at_all_is_an_error_that_says_why(world, policy):
    with pytest.raises(ValueError, match="None of 23 rows gave a pair: {'the source gave no pair': 23}"):
        make(world, policy, source=lambda rows, policy, round=0: [None] * len(rows))


def test_columns_that_are_empty_or_missing_in_a_block_are_filled(world, policy):
    class Changing(Slow):
        def __call__(self, rows, policy, round=0):
            made = super().__call__(rows, policy, round)
            for row, pair in zip(rows, made, strict=True):
                if pair is not None:
                    pair["pair_note"] = None if row["id"] < 8 else "late"
                    if row["id"] > 15:
                        pair["pair_extra"] = 1.5
            return made

    make(world, policy, source=Changing())
    rows = {row["id"]: row for row in rows_of(world / "out")}
    assert (rows[0]["pair_note"], rows[9]["pair_note"]) == (None, "late")
    assert (rows[0]["pair_extra"], rows[16]["pair_extra"]) == (None, 1.5)
    assert len({parquet.read_schema(shard) for shard in (world / "out").glob("*.parquet")}) == 1


def test_values_of_several_kinds_name_the_column(tmp_path):
    with pytest.raises(ValueError, match="The column 'prompt' holds values of several kinds"):
        features_of([{"prompt": [{"content": "text"}]}, {"prompt": [{"content": [{"type": "text"}]}]}])
    for number, value in enumerate(([1], "text")):
        parquet.write_table(pyarrow.table({"a": [value]}), tmp_path / f"train-{number}.parquet")
    with pytest.raises(ValueError, match="hold columns of several kinds"):
        give_one_schema(tmp_path)


def test_the_card_says_what_was_made_and_how(world, policy):
    make(world, policy, settings={"seed": 0, "method": "samples"})
    card = (world / "out" / "README.md").read_text()
    assert card.startswith("---\ntags:\n") and '"method": "samples"' in card and f"torch {torch.__version__}" in card
    assert "| pairs | 20 | 87.0% |" in card and f"| no pair: {NO_PAIR} | 3 | 13.0% |" in card
    accepted = [number % 3 for number in range(ROWS) if number % 7 != 3]
    for iteration in range(3):
        so_far = sum(value <= iteration for value in accepted) / len(accepted)
        count = accepted.count(iteration)
        assert f"| {iteration} | {count} | {count / len(accepted):.1%} | {so_far:.1%} |" in card
    assert "## `pair_similarity`" in card and "Mean 0.4" in card


def test_a_histogram_counts_every_value_once():
    lines = list(histogram([0.0, 0.05, 0.1, 0.99, 1.0]))
    assert [int(line.split()[3]) for line in lines] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert list(histogram([0.5, 0.5])) == [f"   0.500 to   0.500        2  {'#' * 30}"]


def test_statistics_take_whatever_columns_there_are():
    reply = [{"role": "assistant", "content": "four"}]
    rows = [{"chosen": reply, "rejected": reply * 2, "pair_guided": n > 1, "pair_text": f"{n}"} for n in range(40)]
    text = "\n".join(statistics(rows))
    assert "| chosen | 4.0 |" in text and "| True | 38 | 95.0% |" in text
    assert "pair_text" not in text  # as many texts as rows


def test_the_command_makes_pairs_that_train(world, capsys, tmp_path):
    model = saved("llava", sharp=4)
    command = ["pairs", "samples", "--model", str(model), "--dataset", str(world / "rows.jsonl"), "--out"]
    command += [str(world / "out"), "--images", str(world / "images"), "--max-new-tokens", "3", "--limit", "6"]
    assert cli.main(command) == 0
    assert "6 rows -> 6 pairs" in capsys.readouterr().out
    assert cli.main(["check", str(world / "out"), "--for", "dpo"]) == 0
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "6 rows -> 6 pairs" in (said := capsys.readouterr().out) and "done already" in said
    assert cli.main([*command, "--seed", "7"]) == 1
    assert "exists. Choose another output" in capsys.readouterr().err
    from trl_vlm import DPOConfig, DPOTrainer

    pairs = datasets.load_dataset(str(world / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_steps": 1,
        "save_strategy": "no",
        "max_length": None,
    }
    trainer = DPOTrainer(str(model), args=DPOConfig(str(tmp_path / "policy"), **settings), train_dataset=pairs)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_judge_is_one_of_two_and_an_unreachable_one_is_an_error(world, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    common = [
        "--model",
        str(saved("llava", sharp=4)),
        "--dataset",
        str(world / "rows.jsonl"),
        "--out",
        str(world / "x"),
    ]
    common += ["--images", str(world / "images"), "--max-new-tokens", "3"]
    assert cli.main(["pairs", "judge", *common]) == 1
    assert "Set exactly one of `judge_model`" in capsys.readouterr().err
    endpoint = ["--endpoint", "http://127.0.0.1:9/v1", "--retries", "0", "--judge-model", "judge"]
    assert cli.main(["pairs", "judge", *common, *endpoint]) == 1
    assert "error: http://127.0.0.1:9/v1 gave no answer to any of" in capsys.readouterr().err
    corrupt = ["--writer-model", "writer", *endpoint[:4], "--images", str(world / "images")]
    assert cli.main(["pairs", "corrupt", *common[2:6], *corrupt]) == 1
    assert "gave no answer" in capsys.readouterr().err
