"""Runs models on benchmarks: replies on all processes, a judge's answers, numbers; resumable at any moment."""

import gc
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from trl_vlm.data.io.atomic import write_whole
from trl_vlm.evaluation.benchmark import Benchmark, Question, Record, Scores
from trl_vlm.evaluation.judges import check_served
from trl_vlm.evaluation.ledger import Ledger, claim
from trl_vlm.evaluation.replies import replies_in_batches, shared_out
from trl_vlm.evaluation.results import Result, installed_versions, write_results
from trl_vlm.evaluation.scoring import JudgeName, Judging
from trl_vlm.evaluation.served import EndpointSettings, ServedModel
from trl_vlm.evaluation.statistics import differences, intervals
from trl_vlm.evaluation.subjects import Subject, replies_of
from trl_vlm.evaluation.tasks import Task, read_tasks
from trl_vlm.judges.chat import Chat, Request
from trl_vlm.judges.spending import spending_of
from trl_vlm.models.downloads import fetch_weights
from trl_vlm.models.generation import Policy, load_policy

logger = logging.getLogger(__name__)

JUDGED_AT_ONCE = 64  # requests between saves


@dataclass(frozen=True)
class JudgeSource:
    """A judge that is made when it is needed, after the evaluated models have left the device.

    Args:
        name: Folder, hub id, or name at an endpoint: what results say.
        make: Makes the judge.
        revision: Commit of its weights, if known.
        local_models: What `make` loads on each process, downloaded once per node before.
    """

    name: str
    make: Callable[[], Chat]
    revision: str = ""
    local_models: Sequence[str] = ()


@dataclass(frozen=True)
class RunSettings:
    """How benchmarks are run.

    Args:
        data: Folder of their published files.
        output: Folder for replies, answers and results, from which a killed run is resumed.
        judge: Judges the benchmarks that need one.
        prompts: Benchmark to prompt form; the benchmark's first one by default.
        limit: Items per benchmark at most, drawn by their names, so that the same ones are drawn each time.
        batch_size: Items per call of `generate`, on each process.
        max_new_tokens: Longest reply; the benchmark's own limit if None.
        dtype: Precision of the models.
        endpoint: How models behind an endpoint are asked.
        progress: Whether to show progress bars.
    """

    data: Path
    output: Path
    judge: JudgeSource | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None
    dtype: str = "auto"
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    progress: bool = True


def run_benchmarks(
    subjects: Sequence[Subject], benchmarks: Sequence[Benchmark], settings: RunSettings
) -> list[Result]:
    """Measures models on benchmarks; the first model is compared with each of the others.

    All processes generate and ask the judge; each result is on every process. Everything that can be checked is
    checked before the first reply is made.

    Args:
        subjects: The models; the first is the one that is compared, the others are baselines.
        benchmarks: What they are measured on.
        settings: Where, and how.

    Returns:
        One result per model and benchmark. `results.json` and `results.md` are in the output folder, with the records
        of each model and benchmark beside them.

    Raises:
        ConnectionError: An endpoint left questions without a reply; what it replied is kept.
        ValueError: A file, image, reply or judge is missing; or the output holds results with other settings.
    """
    state = PartialState()
    tasks = make_replies(subjects, benchmarks, settings)
    if settings.judge is not None:
        _ask_judge(subjects, tasks, settings.judge, settings)
    state.wait_for_everyone()
    results = _score(subjects, tasks, settings)
    if state.is_main_process:
        write_results(settings.output, results, benchmarks)
    state.wait_for_everyone()
    return results


def make_replies(
    subjects: Sequence[Subject], benchmarks: Sequence[Benchmark], settings: RunSettings
) -> Sequence[Task]:
    """The first part of `run_benchmarks`: everything is checked, and replies that are missing are generated.

    Args:
        subjects: The models.
        benchmarks: What they are measured on.
        settings: Where, and how.

    Raises:
        ConnectionError, ValueError: As in `run_benchmarks`.
    """
    tasks = read_tasks(
        benchmarks,
        settings.data,
        prompts=settings.prompts,
        limit=settings.limit,
        max_new_tokens=settings.max_new_tokens,
    )
    _check(subjects, tasks, settings)
    for place, subject in enumerate(subjects):
        if place:
            _free_memory()
        _make_replies(subject, tasks, settings)
    PartialState().wait_for_everyone()
    for subject in subjects:
        if subject.is_endpoint:
            _check_replies(subject, tasks, settings)
    return tasks


def _check(subjects: Sequence[Subject], tasks: Sequence[Task], settings: RunSettings) -> None:
    """Refuses invalid arguments before anything is generated."""
    if not subjects or not tasks:
        raise ValueError(f"there are {len(subjects)} models and {len(tasks)} benchmarks; at least one of each.")
    needy = [task.benchmark.name for task in tasks if task.benchmark.judging]
    if needy and settings.judge is None:
        raise ValueError(f"{', '.join(needy)} need a judge. Name one (`--judge-model`), or leave them out.")
    for subject in subjects:
        if subject.replies is None:
            subject.check()
        # Before anything is written: it refuses addresses that hold a password.
        served = ServedModel(subject, settings.endpoint) if subject.is_endpoint else None
        for task in tasks:
            if subject.replies is not None:
                replies_of(subject, task.benchmark.name, task.questions)
            if PartialState().is_main_process:
                claim(_folder(subject, task, settings), {**subject.identity(), **task.identity()})
        if served and PartialState().is_main_process and _left(subject, tasks, settings):
            served.probe()
    PartialState().wait_for_everyone()


def _left(subject: Subject, tasks: Sequence[Task], settings: RunSettings) -> dict[str, list[Question]]:
    """Task to the questions that have no reply yet, where there are any."""
    found = {}
    for task in tasks:
        done = Ledger(_folder(subject, task, settings), "replies", 0).entries()
        if left := [question for question in task.questions if question.id not in done]:
            found[task.benchmark.name] = left
    return found


def _check_replies(subject: Subject, tasks: Sequence[Task], settings: RunSettings) -> None:
    """Refuses the replies of an endpoint if some are missing, or several models gave them."""
    missing = _left(subject, tasks, settings)
    if missing:
        counts = ", ".join(f"{len(left)} of {name}" for name, left in missing.items())
        raise ConnectionError(
            f"{subject.name}: the endpoint gave no reply to some questions ({counts}); the log says why. What it "
            "replied is kept: run the same command again."
        )
    for task in tasks:
        folder = _folder(subject, task, settings)
        entries = Ledger(folder, "replies", 0).entries().values()
        check_served({name for entry in entries for name in entry.get("served", ())}, folder, subject.name)


def _folder(subject: Subject, task: Task, settings: RunSettings) -> Path:
    return settings.output / subject.folder / f"{task.benchmark.name}-{task.form}"


def _make_replies(subject: Subject, tasks: Sequence[Task], settings: RunSettings) -> None:
    """The replies of one model that are still missing, this process's share of them."""
    policy: Policy | None = None
    served: ServedModel | None = None
    for task in tasks:
        ledger = Ledger(_folder(subject, task, settings), "replies", PartialState().process_index)
        done = ledger.entries()
        # No process may add entries before all have seen what is there, or they would divide different questions among
        # themselves.
        PartialState().wait_for_everyone()
        left = [question for question in task.questions if question.id not in done]
        if subject.replies is not None:
            if PartialState().is_main_process and left:
                said = replies_of(subject, task.benchmark.name, task.questions)
                ledger.append({"id": q.id, "reply": said[q.id], "is_finished": None} for q in left)
            continue
        if not left:
            continue
        if subject.is_endpoint:
            served = served or ServedModel(subject, settings.endpoint)
            _ask_endpoint(served, task, left, ledger, settings)
            continue
        if policy is None:
            policy = load_policy(subject.path, settings.dtype)
        _generate(policy, task, left, ledger, settings)


def _free_memory() -> None:
    """Lets go of a model before the next one is loaded; a third of a second, which nothing needs after the last."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _generate(policy: Policy, task: Task, left: Sequence[Question], ledger: Ledger, settings: RunSettings) -> None:
    batches = list(shared_out(left, settings.batch_size))
    label = f"{task.benchmark.name}: replies"
    hidden = not (settings.progress and PartialState().is_main_process)
    with tqdm(total=sum(map(len, batches)), desc=label, unit="reply", disable=hidden or None) as bar:
        for batch, replies in zip(batches, replies_in_batches(policy, task, batches), strict=True):
            entries = zip(batch, replies, strict=True)
            ledger.append({"id": q.id, "reply": text, "is_finished": ended} for q, (text, ended) in entries)
            bar.update(len(batch))


def _ask_endpoint(
    served: ServedModel, task: Task, left: Sequence[Question], ledger: Ledger, settings: RunSettings
) -> None:
    state, size = PartialState(), settings.endpoint.concurrency
    mine = left[state.process_index :: state.num_processes]
    hidden = not (settings.progress and state.is_main_process)
    with tqdm(total=len(mine), desc=f"{task.benchmark.name}: replies", unit="reply", disable=hidden or None) as bar:
        for start in range(0, len(mine), size):
            block = mine[start : start + size]
            replies = served.replies(task, block)
            ledger.append(
                {"id": question.id, "reply": reply.text, "is_finished": reply.is_finished, "served": served.served}
                for question, reply in zip(block, replies, strict=True)
                if reply.text is not None
            )
            bar.set_postfix_str(str(served.spending))
            bar.update(len(block))


def _ask_judge(subjects: Sequence[Subject], tasks: Sequence[Task], judge: JudgeSource, settings: RunSettings) -> None:
    """The judge's answers that are still missing, this process's share of them."""
    state, chat = PartialState(), None
    judged = [(task, task.benchmark.judging) for task in tasks if task.benchmark.judging is not None]
    for subject in subjects:
        for task, judging in judged:
            folder = _judge_folder(subject, task, settings, JudgeName(judge.name, judge.revision, judging.digest))
            folder.mkdir(parents=True, exist_ok=True)
            ledger = Ledger(folder, "answers", state.process_index)
            records = _records(subject, task, settings, {})
            answered = {name for name, entry in ledger.entries(_has_answer).items() if _has_answer(entry)}
            state.wait_for_everyone()
            pairs = zip(task.questions, records, strict=True)
            requests = [(r.id, judging.request(q, r)) for q, r in pairs if r.id not in answered]
            left = [(name, request) for name, request in requests if request is not None]
            mine = left[state.process_index :: state.num_processes]
            if left:  # on every process
                fetch_weights({name: {} for name in judge.local_models})
            if not mine:
                continue
            if chat is None:
                _free_memory()
                chat = judge.make()
            label = f"{subject.name}, {task.benchmark.name}: judge"
            _answer(chat, judging, mine, ledger, label, settings)


def _answer(
    chat: Chat,
    judging: Judging,
    asked: Sequence[tuple[str, Request]],
    ledger: Ledger,
    label: str,
    settings: RunSettings,
) -> None:
    hidden = not (settings.progress and PartialState().is_main_process)
    with tqdm(total=len(asked), desc=label, unit="answer", disable=hidden or None) as bar:
        for start in range(0, len(asked), JUDGED_AT_ONCE):
            block = asked[start : start + JUDGED_AT_ONCE]
            answers = judging.ask(chat, [request for _, request in block])
            served = sorted(getattr(chat, "served", ()))
            ledger.append(
                {"id": name, "answer": answer.text, "reason": answer.reason, "served": served}
                for (name, _), answer in zip(block, answers, strict=True)
            )
            if spent := spending_of(chat):
                bar.set_postfix_str(str(spent))
            bar.update(len(block))


def _judge_name(task: Task, settings: RunSettings) -> JudgeName | None:
    judging, judge = task.benchmark.judging, settings.judge
    return JudgeName(judge.name, judge.revision, judging.digest) if judging and judge else None


def _judge_folder(subject: Subject, task: Task, settings: RunSettings, judge: JudgeName) -> Path:
    return _folder(subject, task, settings) / judge.folder


def _records(
    subject: Subject, task: Task, settings: RunSettings, answers: Mapping[str, Mapping[str, Any]]
) -> list[Record]:
    """The records of a model, in the order of the questions."""
    said = Ledger(_folder(subject, task, settings), "replies", 0).entries()
    records = []
    for question in task.questions:
        entry, answer = said[question.id], answers.get(question.id, {})
        records.append(
            Record(
                id=question.id,
                group=question.group,
                prompt=task.prompt(question),
                reply=entry["reply"],
                truth=question.truth,
                is_finished=entry["is_finished"],
                answer=answer.get("answer"),
                answer_reason=answer.get("reason", ""),
                tables=question.tables,
                images=[_image_name(image) for image in question.images],
            )
        )
    return records


def _image_name(image: object) -> str:
    """The file of an image, or the name that it came with."""
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else Path(image.get("path") or "").name
    return (
        os.path.abspath(image) if isinstance(image, str | os.PathLike) and os.path.isfile(image) else str(image or "")
    )


def _score(subjects: Sequence[Subject], tasks: Sequence[Task], settings: RunSettings) -> list[Result]:
    """The numbers of all models, and the first one's differences from the others."""
    results = []
    for task in tasks:
        groups = [question.group for question in task.questions]
        scored: dict[str, Scores] = {}
        rows: list[Result] = []
        for subject in subjects:
            folder, judge, served = _folder(subject, task, settings), _judge_name(task, settings), []
            answers: dict[str, dict[str, Any]] = {}
            if judge:
                folder = _judge_folder(subject, task, settings, judge)
                answers = Ledger(folder, "answers", 0).entries(_has_answer)
                served = sorted({name for entry in answers.values() for name in entry.get("served", ())})
                check_served(served, folder)
            records = _records(subject, task, settings, answers)
            scores = scored[subject.name] = task.benchmark.score(records)
            rows.append(
                Result(
                    model=subject.name,
                    task=task.benchmark.name,
                    prompt=task.form,
                    judge=judge,
                    served=served,
                    records=len(records),
                    metrics=scores.metrics,
                    intervals=intervals(scores, groups),
                    versions=installed_versions(),
                )
            )
            if PartialState().is_main_process:
                _write(folder, records, rows[-1])
        against = {
            subject.name: differences(scored[subject.name], scored[subjects[0].name], groups)
            for subject in subjects[1:]
        }
        rows[0] = replace(rows[0], differences=against)
        results += rows
    return results


def _has_answer(entry: Mapping[str, Any]) -> bool:
    return entry["answer"] is not None


def _write(folder: Path, records: Sequence[Record], result: Result) -> None:
    lines = "".join(json.dumps(record.as_json(), ensure_ascii=False) + "\n" for record in records)
    write_whole(folder / "records.jsonl", lines.encode("utf-8", "backslashreplace"))
    text = json.dumps(result.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "scores.json", text + "\n")
