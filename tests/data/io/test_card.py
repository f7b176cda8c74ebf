"""What a model wrote stands in the card as text."""

import re

import pytest

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


def test_no_setting_and_no_reason_ends_its_place_in_the_card(tmp_path):
    import pyarrow

    reply = [{"role": "assistant", "content": "four"}]
    table = pyarrow.Table.from_pylist([{"chosen": reply, "rejected": reply, "pair_`\nx": "```"}])
    write_parquet(table, tmp_path / "train-00000.parquet")
    progress = Progress({"judge_model": "````\n# out\n"}, [Part(0, 2, 1, {"the answer | <b>": 1}, 0)])
    write_card(tmp_path / "README.md", "pairs [1](x)", tmp_path, progress, 1.0)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "# pairs \\[1\\](x)" in lines
    fences = [line for line in lines if line.startswith("`````")]
    assert fences == ["`````json", "`````"]
    assert "| no pair: the answer \\| &lt;b&gt; | 1 | 50.0% |" in lines
    assert "## `pair_ x`" in lines
