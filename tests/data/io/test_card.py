"""What a model wrote stands in the card as text."""

import re

import pyarrow
import pytest

import trl_vlm
from trl_vlm.data.io import card
from trl_vlm.data.io.card import about, as_text, write_card
from trl_vlm.data.io.progress import Part, Progress
from trl_vlm.data.io.shards import write_parquet

HOSTILE = [
    "a | b",
    "line\n\n# Heading\n\n| x | y |",
    "<script>alert(1)</script>",
    "![pixel](https://host/pixel.png)",
    "[click](http://host)",
    "see https://host/x and www.host.org",
    "```\n# out\n```",
    "`code` *bold* _slanted_ ~~no~~ $x$",
    "&lt;b&gt;",
    "\x1b[31mred\x00",
    "long " * 5000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_free_text_is_one_cell_of_plain_text(text):
    shown = as_text(text)
    assert shown.isprintable() and len(shown) < 1000
    assert not re.search(r"(?<!\\)[|`*\[\]]|<|://|www\.", shown)
    (row,) = [line for line in about("pair_verdict", [text]) if line.startswith("| ") and "100.0%" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_what_needs_no_care_is_shown_as_it_is():
    assert [as_text(value) for value in ("pair_source", 3, -1, "87.0%", "no pair: it's odd")] == [
        "pair_source",
        "3",
        "-1",
        "87.0%",
        "no pair: it's odd",
    ]


def write_shard(folder):
    reply = [{"role": "assistant", "content": "four"}]
    table = pyarrow.Table.from_pylist([{"chosen": reply, "rejected": reply, "pair_`\nx": "```"}])
    write_parquet(table, folder / "train-00000.parquet")


def test_no_setting_and_no_reason_ends_its_place_in_the_card(tmp_path):
    write_shard(tmp_path)
    progress = Progress({"judge_model": "````\n# out\n"}, [Part(0, 2, 1, {"the answer | <b>": 1}, 0)])
    write_card(tmp_path / "README.md", "pairs [1](x)", tmp_path, progress, 1.0)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "# pairs \\[1\\](x)" in lines
    fences = [line for line in lines if line.startswith("`````")]
    assert fences == ["`````json", "`````"]
    assert "| no pair: the answer \\| &lt;b&gt; | 1 | 50.0% |" in lines
    assert "## `pair_ x`" in lines


def test_a_package_that_runs_from_a_checkout_without_being_installed_writes_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "version", {"torch": "1", "transformers": "2", "datasets": "3"}.__getitem__)
    write_shard(tmp_path)
    card.write_card(tmp_path / "README.md", "pairs", tmp_path, Progress({}, [Part(0, 1, 1, {}, 0)]), 1.0)
    versions = f"Versions: trl-vlm {trl_vlm.__version__}, torch 1, transformers 2, datasets 3."
    assert versions in (tmp_path / "README.md").read_text().splitlines()
