"""`trl-vlm pairs`: preference pairs that a model makes, written to disk."""

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from trl_vlm.cli.options import add_source, positive, source_of, write
from trl_vlm.judges import Chat, EndpointChat, Judge, LocalChat, PairwiseJudge, RewardJudge
from trl_vlm.models.generation import Policy, generating
from trl_vlm.models.loading import load_generative_model, load_generative_processor
from trl_vlm.models.unsharded import unsharded_loading
from trl_vlm.pairs.bdhs.bdhs import BDHS
from trl_vlm.pairs.bdhs.similarity import DEFAULT_ENCODER, SentenceEncoder
from trl_vlm.pairs.corruption import Corrupted
from trl_vlm.pairs.judged import Judged
from trl_vlm.pairs.povid import POVID
from trl_vlm.pairs.samples import SelfSamples
from trl_vlm.pairs.source import PairSource
from trl_vlm.pairs.writer import PairReport, PairWriter
from trl_vlm.rewards import RewardModelReward

# Options that change how pairs are made but not which, so that a run may go on with other ones.
NOT_ABOUT_THE_PAIRS = {"out", "batch_size", "block_rows", "skip_bad", "overwrite", "json", "cache", "concurrency"}
NOT_ABOUT_THE_PAIRS |= {"timeout_seconds", "retries", "max_requests", "key_variable", "dataset", "limit"}
SOURCE_OPTIONS = {"split", "config", "revision", "data_files"}

SAMPLING = {
    "temperature": {"type": float, "default": 1.0, "help": "temperature of the samples"},
    "max_new_tokens": {"type": positive, "default": 256, "help": "longest reply, in tokens"},
    "seed": {"type": int, "default": 0, "help": "seed of all draws"},
}
BDHS_OPTIONS = {
    "mask_share": {"type": float, "default": 0.99, "help": "expected share of hidden image tokens"},
    "noise_steps": {"type": int, "help": "also distort the image, by this many steps of noise (up to 1000)"},
    "iterations": {"type": positive, "default": 5, "help": "attempts per row, the last of several without guidance"},
    "threshold": {"type": float, "default": 0.97, "help": "a reply is accepted if its similarity is smaller"},
    "unguided": {"action": "store_true", "help": "one reply without guidance and gate: mask only"},
    "encoder": {"default": DEFAULT_ENCODER, "help": "folder or hub id of the sentence encoder of the gate"},
    "per_sentence": {"action": "store_true", "help": "compare sentence by sentence, for long replies"},
    "max_sentence_tokens": {"type": positive, "default": 64, "help": "longest continuation of a sentence, in tokens"},
}
SEED = {"seed": SAMPLING["seed"]}
POVID_OPTIONS = {
    "noise_steps": {"type": int, "default": 500, "help": "steps of noise on the image (up to 1000)"},
    "indexing": {"choices": ("code", "paper"), "default": "code", "help": "how the steps are counted"},
    "overflow": {"choices": ("wrap", "clip"), "default": "wrap", "help": "what becomes of colours out of range"},
    "keep_rejected": {"action": "store_true", "help": "keep the row's rejected reply, and put the new one beside it"},
}
ENDPOINT = {
    "endpoint": {"help": "address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1"},
    "key_variable": {"help": "environment variable that holds the endpoint's key"},
    "max_requests": {"type": positive, "help": "requests that a process may send to the endpoint"},
    "cache": {"help": "folder for the endpoint's answers; what is there is not asked again"},
    "concurrency": {"type": positive, "default": 8, "help": "requests at once"},
    "timeout_seconds": {"type": float, "default": 120.0, "help": "for one request"},
    "retries": {"type": int, "default": 6, "help": "attempts after the first, for what fails in passing"},
    "answer_tokens": {"type": positive, "default": 512, "help": "longest answer, in tokens"},
}
JUDGE = {
    "judge_model": {"help": "folder or hub id of a vision-language model that judges, or its name at --endpoint"},
    "reward_model": {"help": "folder of a reward model that judges"},
    "one_order": {"action": "store_true", "help": "ask once, in an order that hangs on the texts; half the cost"},
    "show_ground_truth": {"action": "store_true", "help": "show the judge the row's facts and reference reply"},
    "replies": {"type": int, "default": 2, "help": "replies per row"},
}
WRITER = {
    "writer_model": {
        "help": "folder or hub id of the model that rewrites, or its name at --endpoint",
        "required": True,
    },
    "show_images": {"action": "store_true", "help": "show that model the images too"},
}


class Command(NamedTuple):
    """One way to make pairs.

    Args:
        help: What it does.
        options: Name to arguments of argparse.
        source: Makes the source from the parsed options.
        needs_policy: Whether the source uses `--model`.
    """

    help: str
    options: Mapping[str, Mapping[str, Any]]
    source: Callable[[argparse.Namespace], PairSource]
    needs_policy: bool = True


def chat_of(options: argparse.Namespace, model: str) -> Chat:
    """The model that answers: behind the endpoint if there is one, else on this process's device."""
    if options.endpoint is None:
        return LocalChat(model, max_new_tokens=options.answer_tokens, batch_size=options.batch_size, dtype="auto")
    return EndpointChat(
        options.endpoint,
        model,
        key_variable=options.key_variable,
        max_tokens=options.answer_tokens,
        concurrency=options.concurrency,
        timeout_seconds=options.timeout_seconds,
        retries=options.retries,
        max_requests=options.max_requests,
        cache=options.cache,
    )


def judge_of(options: argparse.Namespace) -> Judge:
    """The judge that the options describe."""
    if (options.judge_model is None) == (options.reward_model is None):
        raise ValueError("A judge is one of --judge-model and --reward-model. Give exactly one of them.")
    if options.reward_model is not None:
        return RewardJudge(RewardModelReward(options.reward_model))
    return PairwiseJudge(
        chat_of(options, options.judge_model),
        both_orders=not options.one_order,
        show_ground_truth=options.show_ground_truth,
    )


def bdhs(options: argparse.Namespace) -> PairSource:
    """The reference's sentences, finished half blind."""
    device = str(PartialState().device)
    return BDHS(
        SentenceEncoder(options.encoder, per_sentence=options.per_sentence, device=device),
        mask_share=options.mask_share,
        noise_steps=options.noise_steps,
        iterations=options.iterations,
        threshold=options.threshold,
        guided=not options.unguided,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        max_sentence_tokens=options.max_sentence_tokens,
        seed=options.seed,
    )


def povid(options: argparse.Namespace) -> PairSource:
    """The reference, with the tokens that the policy guesses behind noise."""
    return POVID(
        noise_steps=options.noise_steps,
        indexing=options.indexing,
        overflow=options.overflow,
        keep_rejected=options.keep_rejected,
        seed=options.seed,
    )


def judged(options: argparse.Namespace) -> PairSource:
    """Samples, of which a judge prefers one."""
    return Judged(
        judge_of(options),
        replies=options.replies,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )


def corrupted(options: argparse.Namespace) -> PairSource:
    """Reference replies, rewritten by a language model."""
    return Corrupted(chat_of(options, options.writer_model), show_images=options.show_images)


def self_samples(options: argparse.Namespace) -> PairSource:
    """Plain samples as rejected replies."""
    return SelfSamples(temperature=options.temperature, max_new_tokens=options.max_new_tokens, seed=options.seed)


COMMANDS = {
    "bdhs": Command("the model finishes the reference half blind", {**BDHS_OPTIONS, **SAMPLING}, bdhs),
    "povid": Command("the reference with the model's guesses behind noise", {**POVID_OPTIONS, **SEED}, povid),
    "judge": Command("the model replies, a judge prefers", {**JUDGE, **SAMPLING, **ENDPOINT}, judged),
    "corrupt": Command("a language model corrupts the reference", {**WRITER, **ENDPOINT}, corrupted, False),
    "samples": Command("plain samples as rejected replies: a control", SAMPLING, self_samples),
}


def add_pairs(command: argparse.ArgumentParser) -> None:
    """`trl-vlm pairs`."""
    methods = command.add_subparsers(required=True, metavar="method", dest="method")
    for name, method in COMMANDS.items():
        parser = methods.add_parser(name, help=method.help)
        parser.set_defaults(command=run_pairs)
        if method.needs_policy:
            parser.add_argument("--model", required=True, help="folder or hub id: all weights, or a PEFT adapter")
            parser.add_argument("--dtype", default="auto", help="precision of the model, such as bfloat16")
        parser.add_argument("--dataset", required=True, help="rows: hub id, folder, .parquet, .json or .jsonl")
        parser.add_argument("--out", required=True, help="folder of parquet shards, or a .parquet or .jsonl file")
        add_source(parser)
        parser.add_argument("--images", help="folder that relative image paths start at")
        parser.add_argument("--embed-images", action="store_true", help="store image files' bytes, not their paths")
        parser.add_argument("--limit", type=positive, help="read this many rows at most")
        parser.add_argument(
            "--batch-size",
            type=positive,
            default=8,
            help="rows at once on each process; for an endpoint, twice --concurrency",
        )
        parser.add_argument("--block-rows", type=positive, default=256, help="rows between two savings")
        parser.add_argument("--skip-bad", action="store_true", help="leave out and count rows that are refused")
        parser.add_argument("--overwrite", action="store_true", help="replace the output, forget an unfinished one")
        parser.add_argument("--json", action="store_true", help="print the report as JSON")
        for option, settings in method.options.items():
            parser.add_argument(f"--{option.replace('_', '-')}", **settings)


def run_pairs(options: argparse.Namespace) -> int:
    """Makes the pairs, and reports."""
    _check_processes()
    method = COMMANDS[options.method]
    left_out = NOT_ABOUT_THE_PAIRS | SOURCE_OPTIONS | {"command"}
    settings = {name: value for name, value in vars(options).items() if name not in left_out and value is not None}
    source = method.source(options)
    policy = load_policy(options.model, options.dtype) if method.needs_policy else None
    writer = PairWriter(
        source,
        policy,
        options.out,
        settings,
        images=options.images,
        embed_images=options.embed_images,
        batch_size=options.batch_size,
        block_rows=options.block_rows,
        skip_bad=options.skip_bad,
        overwrite=options.overwrite,
    )
    with generating(policy.model) if policy is not None else nullcontext():
        report = writer.write(source_of(options, options.dataset), limit=options.limit)
    if report is not None:
        write(asdict(report) if options.json else pairs_text(report))
    PartialState().destroy_process_group()
    return 0


def _check_processes() -> None:
    """Joins the processes that a launcher started."""
    # Without `cpu`, accelerate overlooks them on a machine without GPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise ValueError(
            f"The launcher started {started} processes, and accelerate knows of {state.num_processes}: each would "
            "make all pairs. Start them with `accelerate launch`, or with torchrun."
        )


def load_policy(path: str, dtype: str) -> Policy:
    """The model of a folder or hub id on this process's device, whole on each, and its processor."""
    with unsharded_loading():
        model = load_generative_model(path, dtype=dtype)
    return Policy(model.to(PartialState().device), load_generative_processor(path))


def pairs_text(report: PairReport) -> str:
    """The report for people."""
    lines = [f"{report.rows} rows -> {report.pairs} pairs in {report.output}, {report.rows_per_second:.2f} rows/s"]
    lines += [f"no pair, {reason}: {count}" for reason, count in sorted(report.dropped.items())]
    return "\n".join(lines)
