"""A page of pictures of each split, with the facts, an exact caption and a biased caption."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from trl_vlm.testbed.world import IMAGE_PIXELS, NOUNS, Picture, Split, World, generator

SPLITS: tuple[Split, ...] = ("iid", "balanced", "adv")
ZOOM = 4
CARD_WIDTH, LINE_HEIGHT, MARGIN = 470, 13, 8  # of the PNG, in pixels
LINE_CHARACTERS = 42


class Card(NamedTuple):
    """One picture and its texts, name -> text."""

    picture: Picture
    texts: dict[str, str]


def draw_cards(world: World, count: int, seed: int, split: Split) -> list[Card]:
    """Pictures of a split with facts, an exact caption, a biased caption and two questions."""
    cards = []
    for index in range(count):
        rng = generator(seed, index, split)
        picture = world.picture(rng, split)
        questions = (world.question(picture.scene, rng, biased=False) for _ in range(2))
        texts = {
            "facts": ", ".join(world.facts(picture.scene, rng)),
            "exact": world.caption(picture.scene, rng, biased=False),
            "biased": world.caption(picture.scene, rng, biased=True),
            "questions": "; ".join(f"{question} - {answer}" for question, answer in questions),
        }
        cards.append(Card(picture, texts))
    return cards


def write_contact_sheet(world: World, path: str | Path, *, count: int = 6, seed: int = 0) -> Path:
    """Writes `count` pictures of each split as a page (`.html`) or as one picture (`.png`).

    Words for what the picture does not show are struck out on the page and marked with `!` in the picture.
    """
    path = Path(path)
    if path.suffix not in (".html", ".png"):
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'!r}; name an .html or a .png file.")
    sheets: dict[Split, list[Card]] = {split: draw_cards(world, count, seed, split) for split in SPLITS}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(_page(world, sheets), encoding="utf-8")
    else:
        _poster(world, sheets).save(path)
    return path


def _heading(world: World, split: Split) -> str:
    return f"{split}: P(partner | anchor) = {world.partner_probability_in(split):.2f}"


def _pairs(world: World) -> str:
    pairs = ", ".join(f"{anchor} - {partner}" for anchor, partner in world.partner_of.items())
    return f"World {world.seed}. Anchors and partners: {pairs}. Others: {', '.join(world.neutral)}."


# ---- the page


def _page(world: World, sheets: dict[Split, list[Card]]) -> str:
    sections = "".join(
        f"<h2>{html.escape(_heading(world, split))}</h2><div class='cards'>{''.join(map(_card_html, cards))}</div>"
        for split, cards in sheets.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>The testbed</title><style>
body {{ font: 14px/1.4 sans-serif; margin: 2em }} .cards {{ display: flex; flex-wrap: wrap; gap: 1em }}
.card {{ width: 420px; display: flex; gap: .8em }} img {{ width: 192px; height: 192px; image-rendering: pixelated }}
dt {{ font-weight: bold }} dd {{ margin: 0 0 .3em }} del {{ color: #b00 }}
</style></head><body><h1>The testbed</h1><p>{html.escape(_pairs(world))}
Words for what is not in the picture are struck out.</p>{sections}</body></html>
"""


def _card_html(card: Card) -> str:
    buffer = io.BytesIO()
    card.picture.image.save(buffer, format="PNG")
    source = base64.b64encode(buffer.getvalue()).decode()
    entries = "".join(f"<dt>{name}</dt><dd>{_marked_html(name, card)}</dd>" for name in card.texts)
    return f"<div class='card'><img alt='' src='data:image/png;base64,{source}'><dl>{entries}</dl></div>"


def _marked_html(name: str, card: Card) -> str:
    words = (html.escape(word) for word in card.texts[name].split())
    if name != "biased":
        return " ".join(words)
    invented = _invented(card)
    return " ".join(f"<del>{word}</del>" if word in invented else word for word in words)


def _invented(card: Card) -> set[str]:
    return {word for word in card.texts["biased"].split() if word in NOUNS} - set(card.picture.scene.kinds)


# ---- the picture


def _poster(world: World, sheets: dict[Split, list[Card]]) -> Image.Image:
    card_height = IMAGE_PIXELS * ZOOM + MARGIN
    columns = 3
    rows = {split: -(-len(cards) // columns) for split, cards in sheets.items()}
    height = sum(3 * LINE_HEIGHT + count * card_height for count in rows.values()) + 4 * LINE_HEIGHT
    poster = Image.new("RGB", (columns * CARD_WIDTH + MARGIN, height), "white")
    pen = ImageDraw.Draw(poster)
    pen.text((MARGIN, MARGIN), _pairs(world), fill="black")
    top = 3 * LINE_HEIGHT
    for split, cards in sheets.items():
        pen.text((MARGIN, top), _heading(world, split), fill="black")
        top += 2 * LINE_HEIGHT
        for index, card in enumerate(cards):
            left = MARGIN + index % columns * CARD_WIDTH
            _draw_card(poster, pen, card, left, top + index // columns * card_height)
        top += rows[split] * card_height + LINE_HEIGHT
    return poster


def _draw_card(poster: Image.Image, pen: ImageDraw.ImageDraw, card: Card, left: int, top: int) -> None:
    side = IMAGE_PIXELS * ZOOM
    poster.paste(card.picture.image.resize((side, side), Image.Resampling.NEAREST), (left, top))
    invented = _invented(card)
    for name, text in card.texts.items():
        pen.text((left + side + MARGIN, top), name, fill="gray")
        top += LINE_HEIGHT
        words = [f"{word}!" if name == "biased" and word in invented else word for word in text.split()]
        for line in _lines(words):
            pen.text((left + side + MARGIN, top), line, fill="black")
            top += LINE_HEIGHT


def _lines(words: Sequence[str]) -> list[str]:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > LINE_CHARACTERS:
            lines.append("")
        lines[-1] += f"{word} "
    return lines
