"""Benchmarks during training: a subset of their questions every few steps, with the current model."""

import logging
import math
import time
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import ProcessorMixin, Trainer, TrainerCallback

from trl_vlm.evaluation.benchmark import Benchmark, Record
from trl_vlm.evaluation.benchmarks.pope import PUBLISHED
from trl_vlm.evaluation.replies import replies_to, shared_out
from trl_vlm.evaluation.tasks import Task, read_tasks
from trl_vlm.judges.chat import Answer, Chat, Request
from trl_vlm.trainers.dpo.fresh_pairs import current_policy

logger = logging.getLogger(__name__)


class EvaluationCallback(TrainerCallback):
    """Measures the trained model on subsets of benchmarks before training and every `every_steps` steps.

    Logged: each number as `eval/<benchmark>_<number>`, such as `eval/pope_f1`, on the same questions each time;
    numbers of published parsers are left out. The questions are divided among the processes; under ZeRO-3 and FSDP the
    model is gathered meanwhile. It works with every `Trainer` whose model generates, ours and TRL's.

    Args:
        trainer: Whose model is measured; add the callback to it.
        benchmarks: What it is measured on.
        data: Folder of the benchmarks' files.
        every_steps: Steps between two evaluations.
        limit: Questions per benchmark at most.
        batch_size: Questions at once on each process; None: `per_device_eval_batch_size`.
        max_new_tokens: Longest reply; the benchmark's own limit if None.
        prompts: Benchmark to prompt form.
        judge: Judges the benchmarks that need one.

    Raises:
        ValueError, TypeError: A file, a judge or the trainer's processor is missing, or the model cannot generate.

    Example:
        >>> trainer.add_callback(EvaluationCallback(trainer, [BENCHMARKS["pope"]], "benchmarks/", every_steps=100))
    """

    def __init__(
        self,
        trainer: Trainer,
        benchmarks: Sequence[Benchmark],
        data: str | PathLike,
        *,
        every_steps: int,
        limit: int | None = 200,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        prompts: dict[str, str] | None = None,
        judge: Chat | None = None,
    ):
        if every_steps < 1:
            raise ValueError(f"`every_steps` is {every_steps}; it must be 1 or more.")
        needy = [benchmark.name for benchmark in benchmarks if benchmark.judging]
        if needy and judge is None:
            raise ValueError(f"{', '.join(needy)} need a judge. Pass one as `judge`, or leave them out.")
        _check_trainer(trainer)
        self.trainer, self.every_steps, self.judge = trainer, every_steps, judge
        self.batch_size = batch_size or trainer.args.per_device_eval_batch_size
        self.tasks = read_tasks(benchmarks, Path(data), prompts=prompts, limit=limit, max_new_tokens=max_new_tokens)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures the model as it is before training."""
        if state.global_step == 0:
            self.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures every `every_steps` steps."""
        if state.global_step % self.every_steps == 0:
            self.evaluate()

    def evaluate(self) -> dict[str, float]:
        """The numbers of the current model, logged and returned, on every process."""
        start = time.perf_counter()
        measured: dict[str, float] = {}
        for task in self.tasks:
            metrics = task.benchmark.score(self._records(task)).metrics
            names = [name for name in metrics if PUBLISHED not in name]
            measured |= {f"eval/{task.benchmark.key(name)}": metrics[name] for name in names}
        measured = {name: value for name, value in measured.items() if math.isfinite(value)}
        control = self.trainer.control
        should_log = control.should_log
        # TRL's own `log` would close the averages of its step's metrics.
        Trainer.log(self.trainer, dict(measured))
        # Logging says that this step has been logged, and its loss would be left out.
        control.should_log = should_log
        logger.info("Evaluated %d benchmarks in %.0f s.", len(self.tasks), time.perf_counter() - start)
        return measured

    def _records(self, task: Task) -> list[Record]:
        """Replies and answers of all processes, in the order of the questions."""
        mine: list[Record] = []
        with current_policy(self.trainer) as policy:
            for batch in shared_out(task.questions, self.batch_size):
                for question, (reply, is_finished) in zip(batch, replies_to(policy, task, batch), strict=True):
                    prompt = task.prompt(question)
                    mine.append(Record(question.id, question.group, prompt, reply, question.truth, is_finished))
        answers = self._answers(task, mine)
        # Tables are the same everywhere, and large.
        found = gather_object([(record, answers.get(record.id, Answer(None))) for record in mine])
        records = {record.id: (record, answer) for record, answer in found}
        return [_with(*records[question.id], question.tables) for question in task.questions]

    def _answers(self, task: Task, records: Sequence[Record]) -> dict[str, Answer]:
        """The judge's answers about this process's replies."""
        if task.benchmark.judging is None:
            return {}
        assert self.judge is not None  # the constructor asks for one where a benchmark is judged
        questions = {question.id: question for question in task.questions}
        asked: list[tuple[str, Request]] = []
        for record in records:
            request = task.benchmark.judging.request(questions[record.id], record)
            if request is not None:
                asked.append((record.id, request))
        answers = task.benchmark.judging.ask(self.judge, [request for _, request in asked]) if asked else []
        return {name: answer for (name, _), answer in zip(asked, answers, strict=True)}


def _with(record: Record, answer: Answer, tables: Any) -> Record:
    return Record(
        record.id,
        record.group,
        record.prompt,
        record.reply,
        record.truth,
        record.is_finished,
        answer.text,
        answer.reason,
        tables,
    )


def _check_trainer(trainer: Trainer) -> None:
    if not isinstance(trainer.processing_class, ProcessorMixin):
        raise TypeError(
            f"`trainer.processing_class` is a {type(trainer.processing_class).__name__}. Benchmarks show images, so "
            "the trainer needs the model's processor."
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not getattr(model, "can_generate", lambda: hasattr(model, "generate"))():
        raise TypeError(f"A {type(model).__name__} does not generate, so no benchmark can ask it.")
