"""`trl-vlm evaluate`: models on benchmarks, with intervals and paired differences."""

import argparse
import json
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from trl_vlm.cli.options import CommandFailed, join_processes, positive, write
from trl_vlm.cli.parsing import CommandParser, add_fields, made_of
from trl_vlm.judges.options import ChatOptions

if TYPE_CHECKING:
    from trl_vlm.evaluation.benchmark import Benchmark
    from trl_vlm.evaluation.run import JudgeSource, RunSettings


@dataclass(kw_only=True)
class ScoringJudge(ChatOptions):
    """Which model judges, for the benchmarks that need one."""

    judge_model: str | None = field(
        default=None,
        metadata={"help": "Model that judges: a folder or hub id, or its name at the endpoint."},
    )


# What `trl-vlm evaluate` measures beside models on benchmarks: word -> module below `trl_vlm.cli`, what it does.
WORDS = {
    "judges": ("evaluate_judges", "measure a judge on pairs with known answers, or on published responses"),
    "lmms": ("evaluate_lmms", "add what lmms-eval measured to the results"),
    "rewards": ("evaluate_rewards", "measure reward models on datasets of preference pairs"),
}


def add(command: CommandParser) -> None:
    """Adds the options of `trl-vlm evaluate`."""
    for word, (module, help) in WORDS.items():
        command.add_word(word, help, partial(_add_word, module))
    command.add_argument(
        "model",
        nargs="?",
        help="folder or hub id (all weights, or a PEFT adapter), an OpenAI-compatible endpoint "
        "(http://localhost:8000/v1), or a file of replies (.jsonl, .json, .parquet)",
    )
    command.add_argument(
        "--baseline", nargs="+", action="extend", default=[], help="models or files of replies to compare with"
    )
    command.add_argument(
        "--model-name", metavar="NAME", help="name of the model at its endpoint; or URL#NAME as model"
    )
    command.add_argument(
        "--model-key-variable", metavar="VARIABLE", help="environment variable with the key of the models' endpoints"
    )
    command.add_argument(
        "--model-tokens-field",
        choices=("max_tokens", "max_completion_tokens"),
        default="max_tokens",
        help="what the models' endpoints call the longest reply (default: %(default)s)",
    )
    command.add_argument("--tasks", help="benchmarks, separated by commas; --list names them")
    command.add_argument("--data", default=".", help="folder of their published files (default: %(default)s)")
    command.add_argument("--output", help="folder for replies, answers and results; a killed run is resumed from it")
    command.add_argument("--out", dest="output", default=SUPPRESS, help=SUPPRESS)
    command.add_argument("--replies", help="file or folder of the model's replies that were made elsewhere")
    command.add_argument("--write-questions", metavar="FILE", help="write the questions as JSON Lines, and stop")
    command.add_argument("--list", action="store_true", help="list the benchmarks and what each needs, and stop")
    command.add_argument(
        "--prompt", action="append", default=[], metavar="TASK=FORM", help="prompt form of a benchmark; see --list"
    )
    command.add_argument("--limit", type=positive, help="items per benchmark at most, always the same ones")
    command.add_argument("--batch-size", type=positive, default=8, help="items at once (default: %(default)s)")
    command.add_argument("--max-new-tokens", type=positive, help="longest reply (default: the benchmark's)")
    command.add_argument("--dtype", default="auto", help="precision of the models (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    command.add_argument(
        "--page",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write results.html, one page with all replies and images, as `trl-vlm look` does",
    )
    add_fields(command, ScoringJudge)


def _add_word(module: str, command: CommandParser) -> None:
    code = import_module(f"trl_vlm.cli.{module}")
    code.add(command)
    command.set_defaults(run=code.run)


def run(options: argparse.Namespace) -> int:
    """Evaluates and reports."""
    from trl_vlm.evaluation.benchmarks import BENCHMARKS, find_benchmarks

    if options.list:
        write("\n\n".join(map(about, BENCHMARKS.values())))
        return 0
    if not options.tasks:
        raise ValueError(f"`--tasks` is missing. There are: {', '.join(BENCHMARKS)}.")
    benchmarks = find_benchmarks(options.tasks)
    if options.write_questions:
        return _write_questions(benchmarks, options)
    return _evaluate(benchmarks, options)


def about(benchmark: "Benchmark") -> str:
    """What a benchmark is, and what it needs."""
    lines = {
        "needs": benchmark.files,
        "from": benchmark.source,
        "size": benchmark.size,
        "license": benchmark.license,
        "judge": "none"
        if benchmark.judging is None
        else f"one that {'sees' if benchmark.judging.sees_images else 'reads'}",
        "prompts": ", ".join(f"{form} ({text!r})" for form, text in benchmark.prompts.items()),
    }
    return "\n".join([f"{benchmark.name}: {benchmark.title}", *(f"  {key}: {text}" for key, text in lines.items())])


def _evaluate(benchmarks: "list[Benchmark]", options: argparse.Namespace) -> int:
    from accelerate import PartialState

    from trl_vlm.evaluation.results import HOW_TO_READ, markdown_results
    from trl_vlm.evaluation.run import run_benchmarks
    from trl_vlm.evaluation.subjects import subjects_of
    from trl_vlm.judges.endpoint import SpendingCapReached

    if not options.model and not options.replies:
        raise ValueError("a model is missing: a folder, a hub id or a file of replies; or give `--replies`.")
    if not options.output:
        raise ValueError("`--output` is missing: the folder for replies and results.")
    join_processes()
    replies = Path(options.replies) if options.replies else None
    model = _named_model(options) or Path(options.replies).stem
    subjects = subjects_of([model, *options.baseline], replies)
    try:
        results = run_benchmarks(subjects, benchmarks, _settings(benchmarks, options))
    except SpendingCapReached as error:
        raise CommandFailed(str(error)) from error
    if PartialState().is_main_process:
        if options.json:
            write(json.dumps([result.as_json() for result in results], indent=2, ensure_ascii=False))
        else:
            write(markdown_results(results, benchmarks).removesuffix(HOW_TO_READ + "\n"))
            write(f"written: {Path(options.output) / 'results.md'}, results.json, and the records beside them")
        if options.page:
            _write_page(Path(options.output), options.json)
    PartialState().destroy_process_group()
    return 0


def _write_page(output: Path, is_quiet: bool) -> None:
    from trl_vlm.look.inputs import look

    page = look([str(output)], output / "results.html")
    if not is_quiet:
        write(f"to look at: {page} ({page.stat().st_size / 1e6:.1f} MB)")


def _named_model(options: argparse.Namespace) -> str | None:
    """The model, with its name at an endpoint."""
    from trl_vlm.evaluation.subjects import is_address

    if options.model_name is None:
        return options.model
    if not is_address(options.model or "") or "#" in options.model:
        raise ValueError(
            f"`--model-name` names a model at an endpoint, and the model is {options.model!r}. Give its address, such "
            "as http://localhost:8000/v1, without a name of its own."
        )
    return f"{options.model}#{options.model_name}"


def _settings(benchmarks: "list[Benchmark]", options: argparse.Namespace) -> "RunSettings":
    from trl_vlm.evaluation.run import RunSettings
    from trl_vlm.evaluation.served import EndpointSettings

    needed = [benchmark.name for benchmark in benchmarks if benchmark.judging]
    return RunSettings(
        data=data_of(options),
        output=Path(options.output),
        judge=judge_source(options) if needed and options.judge_model else None,
        prompts=_prompts(options),
        limit=options.limit,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        dtype=options.dtype,
        endpoint=EndpointSettings(
            key_variable=options.model_key_variable,
            tokens_field=options.model_tokens_field,
            concurrency=options.concurrency,
            timeout_seconds=options.timeout_seconds,
            retries=options.retries,
            max_requests=options.max_requests,
            image_side=options.image_side,
        ),
    )


def data_of(options: argparse.Namespace) -> Path:
    """The data folder, which is there."""
    if not Path(options.data).is_dir():
        raise ValueError(f"the data folder {options.data!r} does not exist. `--list` says what must be in it.")
    return Path(options.data)


def _prompts(options: argparse.Namespace) -> Mapping[str, str]:
    pairs = [text.partition("=") for text in options.prompt]
    wrong = [task for task, _, form in pairs if not form]
    if wrong:
        raise ValueError(f"`--prompt {wrong[0]}` names no form. Write TASK=FORM, such as pope=short.")
    return {task: form for task, _, form in pairs}


def judge_source(options: argparse.Namespace) -> "JudgeSource":
    """The judge, after a check that it answers or, for a local one, that it has a processor."""
    from accelerate import PartialState

    from trl_vlm.evaluation.run import JudgeSource
    from trl_vlm.evaluation.served import PROBE
    from trl_vlm.judges.chat import Request
    from trl_vlm.models.downloads import once_per_node
    from trl_vlm.models.loading import load_generative_processor

    chosen, name = made_of(ScoringJudge, options), options.judge_model
    if options.endpoint is None:
        with once_per_node():
            load_generative_processor(name)
        return JudgeSource(name, lambda: chosen.chat(name), revision_of(name), local_models=[name])
    chat = chosen.chat(name)
    if PartialState().is_main_process:
        chat([Request(PROBE, (), "the first request")])  # raises a ConnectionError if no server answers
    return JudgeSource(name, lambda: chat)


def revision_of(name: str) -> str:
    """The commit of a model of the hub; "" for a folder."""
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(name), "_commit_hash", None) or ""
    except OSError:  # an adapter without a configuration
        return ""


def _write_questions(benchmarks: "list[Benchmark]", options: argparse.Namespace) -> int:
    from trl_vlm.evaluation.subjects import write_questions
    from trl_vlm.evaluation.tasks import read_tasks

    tasks = read_tasks(benchmarks, data_of(options), prompts=_prompts(options), limit=options.limit)
    count = write_questions(Path(options.write_questions), tasks)
    write(f"{count} questions in {options.write_questions}; give each its `reply`, and pass the file as --replies.")
    return 0
