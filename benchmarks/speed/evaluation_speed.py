"""What `trl-vlm evaluate` costs beside the generation alone, and how much two processes save.

    python -m benchmarks.speed.evaluation_speed --output docs/results/evaluation_speed.json

Overhead: CPU seconds of `run_benchmarks` (reading questions, sorting, replies that survive a kill, scores, intervals,
records, tables) beside those of a plain loop over the same batches: images opened, the processor, `model.generate`,
decoding. Both with the same loaded model, in turns in one process of one thread. The model is tiny, so that nothing
hides the overhead; a real one takes a thousand times as long for its replies, and the overhead stays.

Processes: wall seconds of the whole command `trl-vlm evaluate` on one and on two processes of one thread each, started
by the same launcher, in turns; and of two separate commands at once with half of the questions each: what the machine
allows, since nothing joins them. The load of the machine is printed beside them: other work on its cores falsifies
them.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks.speed.dpo_speed import processor as word_processor
from trl_vlm.evaluation import run as evaluation_run
from trl_vlm.evaluation.benchmarks import BENCHMARKS
from trl_vlm.evaluation.replies import shared_out
from trl_vlm.evaluation.run import RunSettings, run_benchmarks
from trl_vlm.evaluation.subjects import Subject
from trl_vlm.evaluation.tasks import Task, read_tasks
from trl_vlm.models.generation import Policy, load_policy

BATCH_SIZE = 8
NAMES = ("dog", "cat", "person", "car", "chair", "traffic light")


def save_model(folder: Path, width: int) -> None:
    """A LLaVA with random weights, sharp enough for its replies to differ."""
    torch.manual_seed(0)
    processor = word_processor("llava")
    size = 28 if width < 100 else 112
    processor.image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    tokenizer = processor.tokenizer
    layers = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": size, "patch_size": 14, **layers},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **layers},
        image_token_index=tokenizer.image_token_id,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_data(data: Path, rows: int, size: tuple[int, int]) -> None:
    """Published files of POPE and CHAIR with as many questions each, three questions about an image."""
    random = np.random.RandomState(0)
    (data / "val2014").mkdir(parents=True)
    (data / "pope").mkdir()
    images = [f"COCO_val2014_{number:012}.jpg" for number in range(-(-rows // 3))]
    for place, name in enumerate(images):
        width = size[0] - 8 * (place % 4)
        noise = random.randint(0, 255, (size[1] // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, size[1])).save(data / "val2014" / name)
    for split, name in zip(("random", "popular", "adversarial"), NAMES, strict=False):
        text = f"Is there a {name} in the image?"
        lines = [
            {"question_id": n, "image": image, "text": text, "label": ("yes", "no")[n % 2]}
            for n, image in enumerate(images, start=1)
        ]
        write_lines(data / "pope" / f"coco_pope_{split}.json", lines)
    captions = [
        {"images": [images[n % len(images)]], "objects": [NAMES[n % 6]], "facts": ["A dog waits."], "image_id": n}
        for n in range(rows)
    ]
    write_lines(data / "coco_objects.jsonl", captions)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def plain_loop(policy: Policy, batches: list[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
    """The replies as everybody writes them down: open, process, generate, decode."""
    replies = []
    for rows in batches:
        images = [[Image.open(path).convert("RGB") for path in row["images"]] for row in rows]
        texts = policy.processor.apply_chat_template([row["messages"] for row in rows], add_generation_prompt=True)
        inputs = policy.processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            output = policy.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        replies += policy.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def asked(task: Task) -> list[list[dict[str, Any]]]:
    """The batches of an evaluation, as messages and paths."""
    batches = []
    for batch in shared_out(task.questions, BATCH_SIZE):
        texts = [[{"type": "image"}, {"type": "text", "text": task.prompt(question)}] for question in batch]
        batches.append(
            [
                {"messages": [{"role": "user", "content": text}], "images": list(question.images)}
                for text, question in zip(texts, batch, strict=True)
            ]
        )
    return batches


def cpu_seconds(call: Callable[[], object]) -> float:
    before = time.process_time()
    call()
    return time.process_time() - before


def overhead(name: str, data: Path, model: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of evaluations and of plain loops, in turns; the first of each is not counted."""
    policy = load_policy(str(model), "auto")
    evaluation_run.load_policy = lambda *_: policy  # loading is no part of either
    (task,) = read_tasks([BENCHMARKS[name]], data)
    batches = asked(task)
    found: dict[str, list[float]] = {"evaluation": [], "plain loop": []}
    for turn in range(rounds + 1):
        with tempfile.TemporaryDirectory() as output:
            settings = RunSettings(data, Path(output), batch_size=BATCH_SIZE, max_new_tokens=tokens, progress=False)
            subject = Subject("tiny", str(model))
            spent = cpu_seconds(lambda s=settings, m=subject: run_benchmarks([m], [BENCHMARKS[name]], s))
            records = [json.loads(line) for line in next(Path(output).rglob("records.jsonl")).open()]
        replies: list[str] = []
        alone = cpu_seconds(lambda said=replies: said.extend(plain_loop(policy, batches, tokens)))
        if sorted(record["reply"] for record in records) != sorted(replies):
            raise AssertionError("the evaluation and the plain loop made different replies")
        if turn:
            found["evaluation"].append(spent)
            found["plain loop"].append(alone)
    evaluation_run.load_policy = load_policy
    return found


def command(processes: int, folder: Path, output: Path, limit: int) -> list[str]:
    """The whole command under a launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "trl_vlm.cli"]
    asked = ["evaluate", str(folder / "model"), "--tasks", "pope", "--data", str(folder / "data")]
    asked += ["--output", str(output), "--limit", str(limit)]
    return [sys.executable, *launcher, *asked, "--max-new-tokens", "64", "--batch-size", str(BATCH_SIZE)]


def wall_seconds(processes: int, folder: Path, limit: int, at_once: int = 1) -> float:
    """Wall seconds of some such commands at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as outputs:
        start = time.perf_counter()
        asked = [command(processes, folder, Path(outputs, str(number)), limit) for number in range(at_once)]
        running = [subprocess.Popen(one, **quiet) for one in asked]
        codes = [process.wait() for process in running]
        spent = time.perf_counter() - start
    if any(codes):
        raise RuntimeError(f"{shlex.join(asked[0])} ended with {codes}")
    return spent


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# What an evaluation costs",
        "",
        "`python -m benchmarks.speed.evaluation_speed --output docs/results/evaluation_speed.json`, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}; one thread per "
        "process, batches of 8. Median (least to most).",
    ]
    if results.get("overhead"):
        lines += [
            "",
            "Replies, scores, intervals, records and tables of `run_benchmarks` beside a plain loop over the same "
            "batches (processor, `generate`, decoding) with the same loaded model, in turns, in CPU seconds of "
            f"{results['rows']:,} rows with {results['tokens']} tokens each. The model is a LLaVA of two layers of "
            "width 32: what a real model takes for its replies is many times longer, and the difference stays the "
            f"same. Load of the machine before it: {results['overhead_load']:.1f} on {os.cpu_count()} cores. The page "
            "is not part of it; it takes one to two milliseconds for each image.",
            "",
            "| benchmark | evaluation | plain loop | ratio |",
            "|---|---|---|---|",
        ]
        for name, found in results["overhead"].items():
            ratios = [one / other for one, other in zip(found["evaluation"], found["plain loop"], strict=True)]
            sides = [spread(found["evaluation"]), spread(found["plain loop"]), spread(ratios)]
            lines.append(f"| {name} | {' | '.join(sides)} |")
    if results.get("processes"):
        one, two, apart = (results["processes"][key] for key in ("1", "2", "halves"))
        ratios = [second / first for first, second in zip(one, two, strict=True)]
        limits = [second / first for first, second in zip(one, apart, strict=True)]
        lines += [
            "",
            "The whole command under `torchrun`, start included, in wall seconds; a wider model. Two commands at once "
            "with half of the questions each share nothing but the machine: their ratio is what its cores allow. Load "
            f"of the machine beforehand: {results['load']:.1f} on {os.cpu_count()} cores.",
            "",
            "| rows | one process | two processes | ratio | two commands, half each | ratio |",
            "|---|---|---|---|---|---|",
            f"| {results['launched_rows']:,} | {spread(one)} | {spread(two)} | {spread(ratios)} | {spread(apart)} | "
            f"{spread(limits)} |",
        ]
    return "\n".join(lines) + "\n"


def measure_overhead(results: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    write_data(folder / "data", args.rows, (96, 72))
    save_model(folder / "model", 32)
    results |= {"rows": args.rows, "tokens": args.tokens, "overhead_load": os.getloadavg()[0], "overhead": {}}
    for name in ("pope", "chair"):
        results["overhead"][name] = overhead(name, folder / "data", folder / "model", args.tokens, args.rounds)


def measure_processes(results: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    write_data(folder / "data", args.launched_rows, (160, 120))
    save_model(folder / "model", 256)
    found: dict[str, list[float]] = {"1": [], "2": [], "halves": []}
    rows = args.launched_rows
    results |= {"launched_rows": rows, "load": os.getloadavg()[0], "processes": found}
    for _ in range(args.launched_rounds):
        found["1"].append(wall_seconds(1, folder, rows))
        found["2"].append(wall_seconds(2, folder, rows))
        found["halves"].append(wall_seconds(1, folder, rows // 2, at_once=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="Tokens per reply of the overhead.")
    parser.add_argument("--launched-rows", type=int, default=600)
    parser.add_argument("--launched-rounds", type=int, default=2)
    parser.add_argument("--only", choices=("overhead", "processes"), help="The other half stays as it was measured.")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if args.only and args.output is not None and args.output.is_file():
        results = json.loads(args.output.read_text())
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "processes":
            measure_overhead(results, Path(folder, "tiny"), args)
        if args.only != "overhead":
            measure_processes(results, Path(folder, "wide"), args)
    sys.stdout.write(table(results))
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
