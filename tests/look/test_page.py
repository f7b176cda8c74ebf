"""The page without a browser: nothing that a model wrote ends up as markup, and nothing outside is named."""

import base64
import hashlib
import json
import re
from importlib.resources import files

import pytest

from tests.look.helpers import HOSTILE, pair, turn
from trl_vlm.look.page import CHUNK, write_page
from trl_vlm.look.segments import Segments
from trl_vlm.look.shown import Mark, ShownText, columns_of, shown_values
from trl_vlm.look.thumbnails import Thumbnails
from trl_vlm.look.views.pairs import pairs_view


def hostile_pairs():
    for number, text in enumerate(HOSTILE):
        yield pair(number) | {
            "chosen": turn(text),
            "rejected": turn(text + " other"),
            "facts": [text],
            "row_name": text,
        }


def page_of(tmp_path, rows, name="page.html", **options):
    thumbnails = Thumbnails()
    view = pairs_view(rows, thumbnails, Segments())
    path = write_page(tmp_path / name, [view], title="A <title> & more", pictures=thumbnails.pictures, **options)
    return path.read_text(encoding="utf-8")


def blocks(page):
    """Name to value of the page's JSON."""
    found = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', page, flags=re.DOTALL)
    return {name: json.loads(text) for name, text in found}


def test_hostile_words_stay_within_the_json_and_come_back_as_they_were(tmp_path):
    page = page_of(tmp_path, hostile_pairs())
    data = blocks(page)
    rows = data["rows-pairs-0"]
    replies = ["".join(text for text, _, _ in row["texts"][0]["pieces"]) for row in rows]
    assert replies == HOSTILE
    assert [row["facts"] for row in rows] == [[text] for text in HOSTILE]
    # Beside the style, the script and the blocks of JSON there is no markup but our own.
    own = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    assert set(re.findall(r"<(\w+)", own)) == {"html", "head", "meta", "link", "title", "body", "noscript"}
    assert "owned" not in own
    assert page.count("<script") == page.count("</script>") == len(data) + 1
    assert "<!--" not in page


def test_the_title_is_escaped(tmp_path):
    assert "<title>A &lt;title&gt; &amp; more</title>" in page_of(tmp_path, [pair(0)])


def test_the_policy_allows_this_style_and_this_script_and_nothing_else(tmp_path):
    page = page_of(tmp_path, [pair(0)])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for kind, name in (("style-src", "look.css"), ("script-src", "look.js")):
        code = files("trl_vlm.look").joinpath("assets", name).read_text(encoding="utf-8")
        assert code in page
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert parts.pop(kind) == f"'sha256-{digest}'"
    assert parts == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_style_and_script_name_nothing_outside_and_make_no_markup_of_text():
    for name in ("look.css", "look.js"):
        code = files("trl_vlm.look").joinpath("assets", name).read_text(encoding="utf-8")
        assert set(re.findall(r"[a-z]+://[^\"\s)]+", code)) <= {"http://www.w3.org/2000/svg"}
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "fetch(",
            "@import",
            "url(",
        ):
            assert word not in code, f"{name} has {word}"


def test_the_same_rows_give_the_same_bytes(tmp_path):
    assert page_of(tmp_path, hostile_pairs(), "one.html") == page_of(tmp_path, hostile_pairs(), "two.html")


def test_rows_come_in_blocks_and_the_script_before_all_pictures_but_the_first(tmp_path):
    view = pairs_view([pair(number) for number in range(CHUNK + 1)], Thumbnails(), Segments())
    page = write_page(tmp_path / "p.html", [view], title="", pictures=["AAAA"] * (CHUNK + 1)).read_text()
    data = blocks(page)
    assert [len(data[f"rows-pairs-{number}"]) for number in (0, 1)] == [CHUNK, 1]
    assert page.index('id="images-0"') < page.index('"use strict"') < page.index('id="images-1"')


def test_two_views_of_one_name_are_refused(tmp_path):
    view = pairs_view([pair(0)], Thumbnails(), Segments())
    with pytest.raises(ValueError, match=r"different names; got \['pairs', 'pairs'\]"):
        write_page(tmp_path / "p.html", [view, view], title="")


def test_pieces_keep_the_text_beyond_the_sixteen_bit_characters():
    text = ShownText("", "plain", "👩‍👩 a dog 𝒳", [Mark(4, 9, "right"), Mark(6, 9, "invented")])
    assert "".join(piece[0] for piece in text.pieces()) == text.reply
    assert [piece[:2] for piece in text.pieces()] == [("👩‍👩 ", ""), ("a dog", "right"), (" 𝒳", "")]


def test_values_that_are_not_finite_are_named_and_odd_names_cannot_break_a_filter():
    values = shown_values({"x y": float("nan"), "__proto__": 1, "a": None, "big": 2**60, "b": 0.123456})
    assert values == {"__proto__": 1, "big": str(2**60), "b": 0.1235, "not_finite": "x_y"}


def test_columns_have_a_histogram_or_their_commonest_words(tmp_path):
    view = pairs_view([pair(number) for number in range(30)], Thumbnails(), Segments())
    columns = {column["name"]: column for column in columns_of(view.rows)}
    assert columns["source"]["top"] == [("bdhs", 20), ("judged", 10)]
    assert sum(columns["similarity"]["bins"]) == 20
    assert columns["similarity"]["min"] == min(row.values.get("similarity", 1) for row in view.rows)
