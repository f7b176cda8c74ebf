"""The picture at the top of the README: an image, what the model said of it, and what it says after the training.

    python -m benchmarks.before_after outputs/fact_rlhf --output docs/pictures/before_after.svg

It takes the first picture of the finished demo of which the model invented the most, and now names everything and
nothing else: an example of success, not an average. The average is in the line below.
"""

import argparse
import base64
import json
from collections.abc import Iterator
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from trl_vlm.data.io.atomic import write_whole
from trl_vlm.testbed.oracle import find_objects

BEFORE, AFTER = "supervised model", "PPO, with facts"
TASK = "testbed-captions"
TRUE, INVENTED, TEXT, MUTED = "#1a7f37", "#c0262d", "#1f2328", "#57606a"
WIDTH, MARGIN, SIDE, LINE, TOP = 660, 24, 192, 28, 64


class Example(NamedTuple):
    """A picture and two replies about it.

    Args:
        image: The picture.
        objects: What it shows.
        before: What the model said.
        after: What it says now.
    """

    image: Image.Image
    objects: list[str]
    before: str
    after: str

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Whether the reply after is right, how much the one before invents, and how much there is to see."""
        is_right = set(find_objects(self.after)) == set(self.objects)
        return is_right, len(set(find_objects(self.before)) - set(self.objects)), len(self.objects)


def records(folder: Path, model: str) -> dict[str, dict[str, Any]]:
    """A model's replies by the picture's name."""
    path = folder / "evaluation" / model.replace(", ", "_").replace(" ", "_") / f"{TASK}-plain" / "records.jsonl"
    return {record["id"]: record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def best_example(folder: Path) -> Example:
    """The picture to show, of those in which what is usually there is mostly missing."""
    before, after = records(folder, BEFORE), records(folder, AFTER)
    found = []
    for name, record in before.items():
        if name.startswith("adv"):
            image = Image.open(folder / "scenes" / "images" / f"{name}.png")
            found.append(Example(image, record["truth"]["objects"], record["reply"], after[name]["reply"]))
    return max(found, key=lambda example: example.rank)  # the first of the best


def averages(folder: Path) -> tuple[float, float]:
    """Of 100 objects that the model named on all such pictures, how many were invented: before and after."""
    results = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))["results"]
    found = {each["model"]: each["metrics"]["adv_chair_i"] for each in results if each["task"] == TASK}
    scale = 100 if max(found.values()) <= 1 else 1
    return scale * found[BEFORE], scale * found[AFTER]


def words(reply: str, objects: list[str]) -> Iterator[str]:
    """A line of SVG text for each sentence, objects in the color of whether they are there."""
    for sentence in filter(None, (part.strip() for part in reply.split("."))):
        spans = []
        for word in sentence.split():
            if word not in find_objects(word):
                spans.append(escape(word))
            elif word in objects:
                spans.append(f'<tspan fill="{TRUE}" font-weight="700">{escape(word)}</tspan>')
            else:
                style = f'fill="{INVENTED}" font-weight="700" text-decoration="line-through"'
                spans.append(f"<tspan {style}>{escape(word)}</tspan>")
        yield " ".join(spans)


def column(left: int, title: str, reply: str, objects: list[str]) -> list[str]:
    """A heading and the sentences of a reply."""
    found = [f'<text x="{left}" y="{MARGIN + 22}" fill="{MUTED}" font-size="18" font-weight="600">{title}</text>']
    for number, line in enumerate(words(reply, objects)):
        found.append(f'<text x="{left}" y="{TOP + 14 + LINE * number}" fill="{TEXT}" font-size="20">{line}</text>')
    return found


def picture(example: Example, invented: tuple[float, float]) -> str:
    """The SVG."""
    buffer = BytesIO()
    # Large pixels instead of a blurred picture, whatever draws it.
    example.image.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    height = MARGIN + SIDE + 122
    first, second = MARGIN + SIDE + 30, MARGIN + SIDE + 240
    shown = f"The picture shows: {', '.join(example.objects)}."
    average = [
        "Of 100 objects that the model named on all such pictures,",
        f"{invented[0]:.0f} were not there before Fact-RLHF, and {invented[1]:.1f} after.",
    ]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif" role="img">',
        f"<title>Before: {escape(example.before)} After: {escape(example.after)} {escape(shown)}</title>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="12" fill="#ffffff" stroke="#d0d7de"/>',
        f'<image x="{MARGIN}" y="{MARGIN}" width="{SIDE}" height="{SIDE}" href="data:image/png;base64,{data}"/>',
        *column(first, "What it said", example.before, example.objects),
        *column(second, "What it says now", example.after, example.objects),
        f'<text x="{MARGIN}" y="{MARGIN + SIDE + 34}" fill="{TEXT}" font-size="18">{escape(shown)}</text>',
        *(
            f'<text x="{MARGIN}" y="{MARGIN + SIDE + 68 + 24 * number}" fill="{MUTED}" font-size="17">{line}</text>'
            for number, line in enumerate(average)
        ),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the options and writes the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_after", description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of the finished demo")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/before_after.svg"), help="the picture")
    options = parser.parse_args()
    write_whole(options.output, picture(best_example(options.folder), averages(options.folder)))


if __name__ == "__main__":
    main()
