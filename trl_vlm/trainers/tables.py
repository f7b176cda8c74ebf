"""Pairs and replies with their images, in the trackers of a run, as TRL logs completions."""

from collections import deque
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from PIL.Image import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_vlm.data.images import load_image
from trl_vlm.data.messages import message_text
from trl_vlm.data.rows import Row

if TYPE_CHECKING:
    from trl_vlm.trainers.dpo.trainer import DPOTrainer

SHOWN_ROWS = 8  # in TensorBoard, which has no tables
LONGEST_CELL = 2000  # characters


class Table(NamedTuple):
    """Rows to look at.

    Args:
        columns: Name to a value for each row.
        images: Of each row.
    """

    columns: Mapping[str, Sequence[Any]]
    images: Sequence[Sequence[Image]]

    @property
    def frame(self) -> pd.DataFrame:
        """The columns without the images."""
        return pd.DataFrame({name: list(values) for name, values in self.columns.items()})


def log_table(trainer: Trainer, name: str, table: Table) -> None:
    """Writes a table with its images to W&B, Trackio and TensorBoard, those of them that the run reports to.

    Args:
        trainer: Whose run it is; call it on the main process alone.
        name: What the trackers call the table.
        table: The rows.
    """
    for tracker in ("wandb", "trackio"):
        if tracker in _trackers(trainer.args):
            module = import_module(tracker)
            if tracker == "wandb" and module.run is None:
                continue
            frame = table.frame
            frame["image"] = [[module.Image(image) for image in row] for row in table.images]
            module.log({name: module.Table(dataframe=frame)})
    log_to_tensorboard(trainer, name, table)


def log_to_tensorboard(trainer: Trainer, name: str, table: Table) -> None:
    """Writes the first rows of a table to TensorBoard, if the run reports to it: text, and an image beside it.

    Args:
        trainer: Whose run it is.
        name: What TensorBoard calls it.
        table: The rows.
    """
    writers = [getattr(callback, "tb_writer", None) for callback in trainer.callback_handler.callbacks]
    for writer in filter(None, writers):
        step = trainer.state.global_step
        writer.add_text(name, _markdown(table), step)
        for number, images in enumerate(table.images[:SHOWN_ROWS]):
            for place, image in enumerate(images):
                pixels = np.asarray(image.convert("RGB"))  # (height, width, 3)
                writer.add_image(f"{name}/row {number}, image {place}", pixels, step, dataformats="HWC")


def _trackers(args: TrainingArguments) -> Sequence[str]:
    return [args.report_to] if isinstance(args.report_to, str) else args.report_to or []


def _markdown(table: Table) -> str:
    names = list(table.columns)
    rows = [[_cell(table.columns[name][row]) for name in names] for row in range(min(SHOWN_ROWS, len(table.images)))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *rows))


def _cell(value: Any) -> str:
    """A value as one cell of a table: TensorBoard reads Markdown."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + "…"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", "<br>")


def text_of(conversation: Any) -> str:
    """The text of messages, each behind its role where there are several; a string stays as it is."""
    if isinstance(conversation, str):
        return conversation
    texts = [(message.get("role", ""), message_text(message)) for message in conversation]
    return texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {text}" for role, text in texts)


def pairs_table(pairs: Sequence[Row], step: int) -> Table:
    """Preference rows as a table: prompt, both replies, and what the source says of them.

    Args:
        pairs: The rows.
        step: The optimizer step that trained on them.
    """
    columns: dict[str, list[Any]] = {"step": [step] * len(pairs)}
    for name in ("prompt", "chosen", "rejected"):
        columns[name] = [text_of(pair[name]) for pair in pairs]
    for name in dict.fromkeys(name for pair in pairs for name in pair if name.startswith("pair_")):
        columns[name] = [pair.get(name) for pair in pairs]
    images = [[load_image(image, name="a pair's image") for image in pair.get("images") or ()] for pair in pairs]
    return Table(columns, images)


def rollout_table(logs: Mapping[str, Any], step: int) -> Table:
    """The replies that TRL keeps of the last rollout, as a table.

    Args:
        logs: A trainer's `_logs`.
        step: The optimizer step.
    """
    count = len(logs["prompt"])
    columns = {
        "step": [step] * count,
        "prompt": [text_of(prompt) for prompt in logs["prompt"]],
        "completion": [text_of(reply) for reply in logs["completion"]],
        **{name: list(values) for name, values in {**logs["rewards"], **logs["extra"]}.items()},
        "advantage": list(logs["advantages"]),
    }
    images = list(logs["images"] or ())
    return Table(columns, [list(row or ()) for row in images] if images else [[]] * count)


class PairTables(TrainerCallback):
    """Logs the pairs of every so many steps: to the trackers, and as `pairs/pairs_<step>.parquet` in the output.

    Of several processes the first one logs its own.

    Args:
        trainer: Whose pairs a source makes.
        every_steps: Steps between two tables.
    """

    def __init__(self, trainer: "DPOTrainer", every_steps: int):
        self.trainer, self.every_steps = trainer, every_steps
        self.pairs: deque[Row] = deque()

    def add(self, pairs: Sequence[Row]) -> None:
        """Keeps the pairs of a micro-batch until its step ends."""
        if (self.trainer.state.global_step + 1) % self.every_steps == 0:
            self.pairs.extend(pairs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Writes the table of the step."""
        pairs, step = list(self.pairs), state.global_step
        self.pairs.clear()
        if not pairs or not state.is_world_process_zero:
            return
        table = pairs_table(pairs, step)
        assert args.output_dir is not None  # TRL's configurations have a default
        folder = Path(args.output_dir, "pairs")
        folder.mkdir(parents=True, exist_ok=True)
        table.frame.to_parquet(folder / f"pairs_{step:05d}.parquet")
        log_table(self.trainer, "pairs", table)
