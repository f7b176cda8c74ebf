"""What a person sees of a run: headings of its stages, and a line for each logged step."""

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from textwrap import fill
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

logger = logging.getLogger(__name__)

COLUMNS = 110
# What a person looks at first; the rest follows as far as the line has room, and all of it is in `history.json`.
FIRST = (
    "loss",
    "ppo/score",
    "reward",
    "ppo/kl",
    "kl",
    "accuracy",
    "rewards/accuracies",
    "margin",
    "rewards/margins",
    "ppo/value_loss",
    "completions/mean_length",
    "pairs/undecided",
    "mean_token_accuracy",
    "caption_loss",
    "question_loss",
)
# Numbers about the run itself, not about what it learns.
LAST = ("grad_norm", "learning_rate", "num_tokens", "epoch", "step_time", "total_flos", "step")


def heading(number: int, count: int, title: str, about: str = "") -> None:
    """Logs the beginning of a stage: which one, and what it does and why.

    Args:
        number: Of the stage, from 1.
        count: How many stages there are.
        title: Its name.
        about: Sentences.
    """
    text = fill(about, COLUMNS - 10, initial_indent="    ", subsequent_indent="    ")
    logger.info("\n[%d/%d] %s%s", number, count, title, f"\n{text}" if about else "")


def readable(logs: Mapping[str, Any], step: int, steps: int, seconds_left: float | None = None) -> str:
    """A line of a trainer's log: the step, what a person looks at first, and the time that is left.

    Args:
        logs: What the trainer logs.
        step: The optimizer step.
        steps: How many there are.
        seconds_left: Until the end, if known.
    """
    width = len(str(steps))
    line = f"{step:>{width}}/{steps}"
    if "train_runtime" in logs:
        return f"{line}  trained in {_time(logs['train_runtime'])}"
    end = "" if seconds_left is None else f"  ({_time(seconds_left)} left)"
    names = _in_order(logs)
    shared = _shared_start(names)
    line += f"  {shared.rstrip('_')}:" if shared else ""
    for name in names:
        entry = f"  {name.removeprefix(shared)} {_number(logs[name])}"
        if len(line) + len(entry) + len(end) <= COLUMNS:
            line += entry
    return line + end


def _in_order(logs: Mapping[str, Any]) -> list[str]:
    """The names of the numbers, those first that a person looks at first; an evaluation's own before its timings."""
    numbers = [name for name, value in logs.items() if isinstance(value, int | float)]
    timings = ("_runtime", "_per_second")
    measured = [name for name in numbers if not name.endswith(timings) and name.removeprefix("eval_") not in LAST]

    def rank(name: str) -> int:
        plain = name.removeprefix("eval_")
        return FIRST.index(plain) if plain in FIRST else len(FIRST)

    return sorted(measured, key=rank)


def _shared_start(names: Sequence[str]) -> str:
    """What the numbers of one benchmark begin with, such as "eval/pope_"; "" for other logs."""
    start = commonprefix(list(names)) if len(names) > 1 else ""
    return start[: start.rfind("_") + 1] if start.startswith("eval/") else ""


def _number(value: float) -> str:
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class ReadableProgress(ProgressCallback):
    """In place of the callbacks of transformers that print: a line for each logged step, and a bar on a terminal.

    Args:
        seconds: Least time between two lines: tiny models log faster than anyone reads. Evaluations and the end
            always get theirs.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        super().__init__()
        self._seconds, self._last_line = seconds, -math.inf
        self._begin, self._first_step, self._has_bar = 0.0, 0, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock, and the bar where a person watches."""
        self._has_bar = sys.stderr.isatty() and not args.disable_tqdm and state.is_world_process_zero
        self._begin, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=not self._has_bar
            )
        self.current_step = state.global_step

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar of an evaluation."""
        if self._has_bar:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the line."""
        if not state.is_world_process_zero or not logs:
            return
        now, is_plain = time.perf_counter(), not any(name.startswith(("eval", "train_")) for name in logs)
        if is_plain:
            if now - self._last_line < self._seconds:
                return
            self._last_line = now
        done, to_do = state.global_step - self._first_step, state.max_steps - state.global_step
        left = (now - self._begin) / done * to_do if done and to_do and self.training_bar is not None else None
        line = readable(logs, state.global_step, state.max_steps, left)
        if self._has_bar:
            tqdm.write(line, file=sys.stderr)
        else:
            logger.info(line)


def make_readable(trainer: Trainer, seconds: float = 2.0) -> None:
    """Lets a trainer print readable lines instead of dictionaries.

    Args:
        trainer: Any trainer of transformers, TRL or ours.
        seconds: Least time between two lines.
    """
    for printing in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):  # of a notebook, another one
        trainer.remove_callback(printing)
    trainer.add_callback(ReadableProgress(seconds))
