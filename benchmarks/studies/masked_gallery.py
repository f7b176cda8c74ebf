"""The same image answered with more and more of it hidden: what BDHS makes the model say.

    python -m benchmarks.studies.masked_gallery --model outputs/fact_rlhf/sft

Trains the testbed's supervised model if none is given (minutes), and writes `masked_gallery.png` and `.md` into
`--results_dir`: pictures with what each share of hidden image tokens leaves of them, and the greedy captions.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoModelForImageTextToText

from trl_vlm.data.encoding import encode
from trl_vlm.models import load_processor
from trl_vlm.models.image_tokens import image_token_mask
from trl_vlm.models.masked_images import draw_hidden, masked_inputs
from trl_vlm.testbed import World, train_supervised
from trl_vlm.testbed.oracle import find_objects
from trl_vlm.testbed.world import CELL_PIXELS, GRID, REQUEST, Picture

SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Folder of a supervised model of the testbed.")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--results_dir", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    folder = options.model or train_supervised(World(seed=0), "runs/masked_gallery")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), load_processor(folder)
    pictures = World.load(folder).pictures(options.pictures, options.seed, "balanced")
    answers = [answer(model, processor, pictures, share, options.seed) for share in SHARES]
    draw(pictures, answers).savefig(
        options.results_dir / "masked_gallery.png", dpi=110, bbox_inches="tight", metadata={"Software": None}
    )
    (options.results_dir / "masked_gallery.md").write_text(page(pictures, answers))


def answer(model, processor, pictures: list[Picture], share: float, seed: int) -> list[tuple[list[bool], str]]:
    """For each picture, which of its cells are hidden, and the greedy caption."""
    conversation = [{"role": "user", "content": REQUEST}]
    images = [[picture.image] for picture in pictures]
    batch = encode(processor, [conversation] * len(pictures), images, add_generation_prompt=True, padding_side="left")
    # One generator per picture, the same for every share: what is hidden at a small share stays hidden at a larger.
    generators = [torch.Generator().manual_seed(seed + place) for place in range(len(pictures))]
    hidden = draw_hidden(batch["input_ids"], model.config, share, generators)
    with torch.no_grad():
        output = model.generate(**masked_inputs(model, batch, hidden), max_new_tokens=48, do_sample=False)
    texts = processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    cells = hidden[image_token_mask(batch["input_ids"], model.config)].view(len(pictures), -1).tolist()
    return list(zip(cells, texts, strict=True))


def draw(pictures: list[Picture], answers: list[list[tuple[list[bool], str]]]) -> Figure:
    """One row per picture, one column per share; hidden cells are dark, objects that are not there are red."""
    figure = Figure(figsize=(2.3 * len(SHARES), 3.5 * len(pictures)), layout="constrained")
    panels = figure.subplots(len(pictures), len(SHARES), squeeze=False)
    for row, picture in enumerate(pictures):
        for column, share in enumerate(SHARES):
            cells, text = answers[column][row]
            panel = panels[row][column]
            image = picture.image.copy()
            for cell, is_hidden in enumerate(cells):
                top, left = cell // GRID * CELL_PIXELS, cell % GRID * CELL_PIXELS
                if is_hidden:
                    image.paste((25, 25, 25), (left, top, left + CELL_PIXELS, top + CELL_PIXELS))
            panel.imshow(image, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            if row == 0:
                panel.set_title(f"{share:g} hidden", fontsize=11, fontweight="bold")
            if column == 0:
                panel.set_ylabel("there: " + ", ".join(picture.scene.kinds), fontsize=8)
            for line, kind in enumerate(dict.fromkeys(find_objects(text))):
                colour = "#0072B2" if kind in picture.scene.kinds else "#D55E00"
                mark = "" if kind in picture.scene.kinds else "  ✗"
                panel.text(0.02, -0.06 - 0.085 * line, kind + mark, transform=panel.transAxes, fontsize=9,
                           color=colour, va="top")  # fmt: skip
    FigureCanvasAgg(figure)
    return figure


def page(pictures: list[Picture], answers: list[list[tuple[list[bool], str]]]) -> str:
    """The captions as a table."""
    lines = [
        "# The same image, more and more of it hidden",
        "",
        "Greedy captions of the testbed's supervised model while a share of the image tokens is hidden from its "
        "attention (of nine, so that the shares 0.9 and up often hide all). Objects that are not there are **bold**. "
        "`python -m benchmarks.studies.masked_gallery`",
        "",
        "![Pictures with hidden parts, and what the model names](masked_gallery.png)",
        "",
        f"| there | {' | '.join(f'{share:g} hidden' for share in SHARES)} |",
        f"|---|{'---|' * len(SHARES)}",
    ]
    for row, picture in enumerate(pictures):
        kinds = picture.scene.kinds
        named = [find_objects(answers[column][row][1]) for column in range(len(SHARES))]
        cells = [", ".join(kind if kind in kinds else f"**{kind}**" for kind in one) for one in named]
        lines.append(f"| {', '.join(kinds)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
