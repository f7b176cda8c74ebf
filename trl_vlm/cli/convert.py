"""`trl-vlm convert`: public datasets as rows."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl_vlm.cli.options import add_output, add_push, add_source, positive, source_of, write
from trl_vlm.data.converters import CONVERTERS, Report, convert
from trl_vlm.data.converters.a_okvqa import ANSWERS
from trl_vlm.data.converters.dialogues import PLACES, TURNS
from trl_vlm.data.converters.flickr30k_entities import CAPTIONS, FRAMES
from trl_vlm.data.converters.hadpo import REPLIES
from trl_vlm.data.converters.splitting import held_out_path
from trl_vlm.data.converters.vlfeedback import ASPECTS, PAIRS
from trl_vlm.data.converters.vqav2 import ALONE, ANSWER_TYPES, IMAGE_NAMES

# Options of individual converters: name -> arguments of argparse.
CONVERTER_OPTIONS = {
    "pairs": {"choices": PAIRS, "help": "vlfeedback: which pairs of a record to take (default: all)"},
    "min_gap": {"type": float, "help": "vlfeedback: drop pairs whose mean ratings differ by less"},
    "aspects": {"nargs": "+", "choices": ASPECTS, "help": "vlfeedback: which ratings count (default: all three)"},
    "turns": {
        "choices": (ALONE, *TURNS),
        "help": "llava-conversations, vqav2: a row of each reply after its history, of the last one, or of all as "
        "`messages` (default: each); vqav2 alone: each question without the others (its default)",
    },
    "max_turns": {"type": positive, "help": "llava-conversations, vqav2: replies kept of a conversation or image"},
    "image_places": {
        "choices": PLACES,
        "help": "llava-conversations, mmpr: images before the first question, or where they are mentioned, in "
        "contents that are lists of parts (default: start)",
    },
    "answer_types": {"nargs": "+", "choices": ANSWER_TYPES, "help": "vqav2: which answers to take (default: all)"},
    "image_names": {"choices": IMAGE_NAMES, "help": "vqav2: COCO's file names of which year (default: 2014)"},
    "reply": {"choices": ANSWERS, "help": "a-okvqa: the letter, or a rationale and then the letter (default: letter)"},
    "captions": {"choices": CAPTIONS, "help": "flickr30k-entities: captions taken of an image (default: one)"},
    "frame": {
        "choices": FRAMES,
        "help": "flickr30k-entities: what boxes are measured in, the image or the square it is padded to "
        "(default: image)",
    },
    "replies": {"choices": REPLIES, "help": "hadpo: one pair of an image's descriptions, or all (default: one)"},
    "image_column": {"help": "nlf: column of the COCO image id or file name"},
    "question_column": {"help": "nlf: column of the question"},
    "refined_column": {"help": "nlf: column of the reply after feedback (chosen)"},
    "initial_column": {"help": "nlf: column of the reply before feedback (rejected)"},
    "critique_column": {"help": "nlf: column of the feedback, kept as `critique`"},
    "score_column": {"help": "nlf: column of the rating, kept as `score`"},
}


def add(command: argparse.ArgumentParser) -> None:
    """Adds the options of `trl-vlm convert`."""
    command.add_argument("--from", dest="name", required=True, choices=CONVERTERS, help="which dataset it is")
    command.add_argument("--list", action=_List, help="list the datasets and where each is published, and stop")
    command.add_argument("--input", help="hub id, folder, .parquet, .json or .jsonl (default: the dataset's hub id)")
    add_output(command)
    add_source(command)
    command.add_argument("--images", help="folder of the image files that the records name")
    command.add_argument("--facts", help="image_to_caption.json of zhiqings/LLaVA-RLHF-Data, or COCO's captions")
    command.add_argument("--embed-images", action="store_true", help="store image files' bytes instead of their paths")
    command.add_argument("--skip-bad", action="store_true", help="leave out and count records that make no row")
    command.add_argument("--overwrite", action="store_true", help="replace the output, or discard an unfinished one")
    command.add_argument("--limit", type=positive, help="read this many records at most")
    command.add_argument(
        "--shard-records", type=positive, default=500, help="records between saves (default: %(default)s)"
    )
    command.add_argument(
        "--where",
        action="append",
        type=_condition,
        metavar="COLUMN=VALUE",
        help="keep rows with this value in a column, such as hallucination=true; several of a column: any of them",
    )
    command.add_argument("--sample", type=positive, metavar="N", help="draw N rows of those that are left, by --seed")
    command.add_argument(
        "--split-off",
        type=_amount,
        metavar="N",
        help="hold out N rows, or a share of the images such as 0.05, in <output>-heldout beside the output",
    )
    command.add_argument("--seed", type=int, default=0, help="of the sample and of what is held out (default: 0)")
    command.add_argument(
        "--by", choices=["image"], default="image", help="what stands on one side alone (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    add_push(command)
    for name, settings in CONVERTER_OPTIONS.items():
        command.add_argument(f"--{name.replace('_', '-')}", **settings)


def run(options: argparse.Namespace) -> int:
    """Converts and reports what was read, written and left out."""
    if options.push_to_hub:
        from trl_vlm.data.io.hub import create_repository

        create_repository(options.push_to_hub, private=options.private)
    given = {name: getattr(options, name) for name in CONVERTER_OPTIONS if getattr(options, name) is not None}
    report = convert(
        options.name,
        source_of(options, options.input or CONVERTERS[options.name].hub_id),
        options.output,
        images=options.images,
        facts=options.facts,
        embed_images=options.embed_images,
        skip_bad=options.skip_bad,
        overwrite=options.overwrite,
        limit=options.limit,
        shard_records=options.shard_records,
        where=_conditions(options.where or ()),
        sample=options.sample,
        split_off=options.split_off,
        seed=options.seed,
        **given,
    )
    write(asdict(report) if options.json else conversion_text(report))
    if options.push_to_hub:
        push(options)
    return 0


def push(options: argparse.Namespace) -> None:
    """Uploads the rows, those held out as the split `test`, with a card, and prints where they are."""
    from trl_vlm.data.io.card import conversion_card
    from trl_vlm.data.io.hub import progress_of, push_dataset, without_folders

    output = Path(options.output)
    splits = {"train": output} | ({"test": held_out_path(output)} if options.split_off is not None else {})
    progress = progress_of(output)
    title = options.push_to_hub.rpartition("/")[2]
    card = conversion_card(title, CONVERTERS[options.name].hub_id, progress)
    address = push_dataset(options.push_to_hub, splits, without_folders(card, progress.identity))
    sys.stderr.write(f"Uploaded to {address}\n")


def conversion_text(report: Report) -> str:
    """The report for people."""
    done = ", done already" if report.was_done else ""
    lines = [f"{report.records} records -> {report.rows} rows in {report.output}{done}"]
    if report.held_out is not None:
        held = report.held_out
        lines.append(f"held out: {held.rows} rows about {held.images} images in {held.output}")
    lines += [f"left out, {reason}: {count}" for reason, count in sorted(report.dropped.items())]
    return "\n".join(lines)


class _List(argparse.Action):
    """Lists the converters and ends the program."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Writes a line for each converter: its name, and the hub id or the folder or file that it reads."""
        width = max(map(len, CONVERTERS))
        write("\n".join(f"{name:{width}}  {each.hub_id}" for name, each in CONVERTERS.items()))
        parser.exit()


def _condition(text: str) -> tuple[str, str]:
    """A column and a value."""
    column, equals, value = text.partition("=")
    if not column or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=VALUE")
    return column, value


def _conditions(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Column to its values."""
    found: dict[str, list[str]] = {}
    for column, value in pairs:
        found.setdefault(column, []).append(value)
    return found


def _amount(text: str) -> int | float:
    """A number of rows, or a share."""
    return float(text) if "." in text else int(text)
