"""Pairs of equal mean lengths: which are dropped, in memory and on the command line."""

import json
import random

import datasets
import pytest

from tests.families import image, saved
from trl_vlm.cli import main as cli
from trl_vlm.data.errors import RowError
from trl_vlm.pairs import Balanced
from trl_vlm.pairs.balance import DROPPED, Lengths, dropped_pairs

CHOSEN, REJECTED = DROPPED["chosen"], DROPPED["rejected"]


def pair(chosen, rejected, **columns):
    return {
        "prompt": [{"role": "user", "content": "What is it?"}],
        "images": [],
        "chosen": [{"role": "assistant", "content": "a" * chosen}],
        "rejected": [{"role": "assistant", "content": "b" * rejected}],
        **columns,
    }


def named(rows):
    return [{**row, "row_name": f"row {place}"} for place, row in enumerate(rows)]


def kept(rows, **options):
    source = Balanced(**options)
    source.survey(named(rows))
    return [place for place, row in enumerate(source(named(rows))) if row is not None], source


# Chosen replies have a mean of 8, rejected ones of 11.
PAIRS = [(10, 10), (9, 12), (4, 16), (10, 7), (7, 10)]


def test_the_longest_differences_go_first_and_no_more_than_needed():
    places, source = kept([pair(*lengths) for lengths in PAIRS], tolerance=0.1)
    assert places == [0, 1, 3, 4]  # without the third the means are 9 and 9.75
    assert source.dropped == {CHOSEN: 1}
    assert kept([pair(*lengths) for lengths in PAIRS])[0] == [0, 1, 3]  # 9.67 and 9.67


def test_the_order_by_hand():
    pairs = {str(place): Lengths(*lengths) for place, lengths in enumerate(PAIRS)}
    # Shortfalls of the chosen reply: 0, 0.25, 0.75, less than 0, 0.3. Sums: 40 / 55, 36 / 39, 29 / 29.
    assert dropped_pairs(pairs, "chosen", tolerance=0.01, seed=0) == ["2", "4"]
    assert dropped_pairs(pairs, "chosen", tolerance=0.1, seed=0) == ["2"]
    assert dropped_pairs(pairs, "chosen", tolerance=0.3, seed=0) == []


def test_either_side_may_be_the_longer_one():
    rows = [pair(rejected, chosen) for chosen, rejected in PAIRS]
    places, source = kept(rows)
    assert places == [0, 1, 3] and source.dropped == {REJECTED: 2}


def test_many_pairs_agree_within_the_tolerance_and_the_seed_decides_between_equal_ones():
    rng = random.Random(0)
    rows = [pair(rng.randint(20, 80), rng.choice((50, 70, 90))) for _ in range(500)]
    places, _ = kept(rows)
    lengths = [(len(rows[p]["chosen"][0]["content"]), len(rows[p]["rejected"][0]["content"])) for p in places]
    chosen, rejected = (sum(each) for each in zip(*lengths, strict=True))
    assert abs(chosen - rejected) <= 0.01 * rejected and 100 < len(places) < 500
    assert kept(rows)[0] == places == kept(rows, seed=0)[0]
    same = [pair(30, 60)] * 20 + [pair(60, 30)] * 10
    first, second = kept(same, seed=0)[0], kept(same, seed=1)[0]
    assert len(first) == len(second) == 20 and first != second
    assert set(first) >= set(range(20, 30))


def test_pairs_that_cannot_agree_are_brought_as_near_as_they_come_and_that_is_said(caplog):
    places, _ = kept([pair(10, 20), pair(10, 40), pair(10, 30)])
    assert places == [0]
    assert "The mean lengths still differ" in caplog.text


def test_a_dataset_that_agrees_stays_as_it_is_and_keeps_its_columns(caplog):
    caplog.set_level("INFO")
    rows = [pair(10, 12, pair_source="bdhs", id=7), pair(12, 10)]
    source = Balanced()
    source.survey(named(rows))
    made = source(named(rows))
    assert [row["pair_source"] for row in made] == ["bdhs", "dataset"] and made[0]["id"] == 7
    assert "0 of 2 pairs are dropped. Mean lengths (characters): 11.0 chosen, 11.0 rejected before" in caplog.text


def test_tokens_are_counted_with_a_tokenizer():
    rows = [pair(10, 10), pair(10, 10)]
    rows[0]["rejected"][0]["content"] = "What is in the image?"
    by_tokens = Balanced(tokenizer=str(saved("llava")))._length()
    assert by_tokens("What is in the image?") < by_tokens("a" * 21)
    with pytest.raises(ValueError, match="`tolerance` is 1; it must be at least 0"):
        Balanced(tolerance=1)


def test_a_source_that_has_not_seen_the_dataset_says_what_to_do():
    with pytest.raises(ValueError, match="`survey` has not seen them. Balance the pairs once"):
        Balanced()([pair(1, 2)])


# On the command line


@pytest.fixture
def world(tmp_path):
    image(0).save(tmp_path / "0.png")
    rows = [pair(*lengths, images=["0.png"], margin=0.5, id=place) for place, lengths in enumerate(PAIRS * 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(world, *more, output="out"):
    given = ["--input", str(world / "rows.jsonl"), "--output", str(world / output), "--images", str(world)]
    return cli.main(["pairs", "balance", *given, *more])


def test_the_command_writes_the_rows_that_are_left_and_counts_the_others(world, capsys):
    assert run(world, "--tolerance", "0.1") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"no pair, {CHOSEN}: 3"]
    rows = datasets.load_dataset(str(world / "out"), split="train", cache_dir=str(world / "cache"))
    assert rows["id"] == [place for place in range(15) if place % 5 != 2]
    assert rows["margin"][0] == 0.5 and rows["pair_source"][0] == "dataset"
    assert run(world, "--tolerance", "0.1", "--json") == 0  # done already
    assert json.loads(capsys.readouterr().out)["was_done"]
    assert run(world) == 1
    assert "exists. Choose another output" in capsys.readouterr().err


def test_a_bad_row_is_named_or_left_out(world, capsys):
    lines = (world / "rows.jsonl").read_text().splitlines()
    broken = json.loads(lines[1]) | {"rejected": None}
    (world / "rows.jsonl").write_text("\n".join([lines[0], json.dumps(broken), *lines[2:]]) + "\n")
    assert run(world) == 1
    assert "row 1, column 'rejected'" in capsys.readouterr().err
    assert not (world / "out").exists() and not (world / "out.partial").exists()
    assert run(world, "--skip-bad") == 0
    assert "no pair, bad row: 1" in capsys.readouterr().out
    with pytest.raises(RowError, match="row 1, column 'rejected'"):
        source = Balanced()
        source.survey(named([pair(1, 2)]))
        source([{**pair(1, 2), "rejected": None, "row_name": "row 1"}])
