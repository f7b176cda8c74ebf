"""What `trl-vlm estimate` says beside what trainings hold at their peak.

    python -m benchmarks.memory.estimate_accuracy --output docs/results/estimate_accuracy.json

Each training is the method's own command on a random LLaVA of some hundred million parameters, in float32 on a CPU, in
a process of its own: the most memory that was resident, less what the process held after a tiny training.
The estimate gets the same words.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
import transformers

from benchmarks.gpu import models
from trl_vlm.scripts.estimate import Lengths, estimate_of

MIB = 2**20
LIMIT = 0.15
SIZE, REPLY, JUDGE = 224, 64, 84  # pixels, which are 256 image tokens; tokens; tokens of the judge turn
LORA = ["--use_peft", "--lora_target_modules", "language-model", "--lora_r", "64", "--lora_alpha", "16"]
CHECKPOINTING = ["--gradient_checkpointing", "True"]
PLAIN = ["--share_prefix", "False"]
NO_CHECKPOINTING = ["--gradient_checkpointing", "False"]
# With a small vocabulary: on a CPU, TRL's head works with several times what it works with on a GPU.
SHAPES = {
    "tiny": models.SHAPES["tiny"],
    "medium": models.Shape(768, 2048, 14, 12, 12, 1024, 512, 2048, 6, 8),
    "small": models.Shape(768, 2048, 10, 12, 4, 1024, 512, 2048, 6, 8),
}
# Name -> script, shape, options.
RUNS = {
    "DPO, LoRA": ("dpo", "medium", [*LORA, *NO_CHECKPOINTING, "--per_device_train_batch_size", "1", *PLAIN]),
    "DPO, LoRA, prompts shared": ("dpo", "medium", [*LORA, *NO_CHECKPOINTING, "--per_device_train_batch_size", "2"]),
    "PPO, LoRA, roles on one base": (
        "ppo",
        "small",
        [
            *(*LORA, *CHECKPOINTING, "--per_device_train_batch_size", "2", "--num_ppo_epochs", "1"),
            *("--max_completion_length", str(REPLY), "--reward_funcs", "benchmarks.memory.estimate_accuracy.letters"),
        ],
    ),
    "reward, all weights": ("reward", "small", [*NO_CHECKPOINTING, "--per_device_train_batch_size", "1", *PLAIN]),
}
COMMON = ["--max_steps", "2", "--gradient_accumulation_steps", "1", "--use_cpu", "True", "--bf16", "False"]
COMMON += ["--dtype", "float32", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True"]
# Image tokens, words of the prompt, the chat template; the reply, and a judge turn.
PROMPT = 256 + 30
LENGTHS = {name: Lengths(prompt=PROMPT, reply=REPLY + JUDGE * (name == "reward")) for name in ("dpo", "ppo", "reward")}


def letters(completions: list, **columns: object) -> list[float]:
    """A reward without a model."""
    return [float(len(completion[0]["content"])) for completion in completions]


def save(folder: Path, shape: str) -> None:
    """A random model with its processor, and rows."""
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(models.config(SHAPES[shape], SIZE))
    model.generation_config.eos_token_id = SHAPES[shape].vocabulary - 1  # replies do not end early
    model.save_pretrained(folder / shape)
    models.processor(SIZE).save_pretrained(folder / shape)


def words_of(name: str, folder: Path, shape: str) -> list[str]:
    """The words of a command that trains, behind `trl-vlm`."""
    script, _, options = RUNS[name]
    rows = "prompts" if script == "ppo" else "pairs"
    data = ["--dataset_name", str(folder / f"{rows}.parquet"), "--output_dir", str(folder / f"{script}_{shape}")]
    return ["--model_name_or_path", str(folder / shape), *data, *COMMON, *options]


def mib(field: str) -> float:
    """A field of this process's memory: `VmHWM` is the most that was ever resident."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:")) / 1024


def measure(name: str, folder: Path) -> dict[str, float]:
    """Runs a training here, and says what it held."""
    script = import_module(f"trl_vlm.scripts.{RUNS[name][0]}")
    script.main(words_of(name, folder, "tiny"))  # imports what a training imports
    gc.collect()
    before = mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    script.main(words_of(name, folder, RUNS[name][1]))
    return {"peak": mib("VmHWM") - before, "bare": before}


def estimated(name: str, folder: Path) -> dict[str, float]:
    """What the estimate says, in MiB."""
    script = RUNS[name][0]
    memory = estimate_of(f"trl_vlm.scripts.{script}", words_of(name, folder, RUNS[name][1]), LENGTHS[script]).memory
    parts = {role.name: role.total / MIB for role in memory.roles}
    parts |= {"activations": memory.activations / MIB, "generation": memory.generation / MIB}
    return {"total": memory.total / MIB} | parts


def table(results: dict[str, dict]) -> str:
    """The results for people."""
    command = "`python -m benchmarks.memory.estimate_accuracy --output docs/results/estimate_accuracy.json`"
    machine = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    lines = [
        "# What `trl-vlm estimate` says, and what trainings hold",
        "",
        "The peak of resident memory of a process, less what it holds after a tiny training, in MiB, beside the "
        "estimate for the same command. Random LLaVA models in float32 on a CPU, 256 image tokens, "
        f"replies of {REPLY}. {command}; {machine}.",
        "",
        "| training | parameters | estimate | peak | estimate / peak |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        ratio = found["estimate"]["total"] / found["peak"]
        size = f"{found['parameters'] / 1e6:,.0f} M"
        lines.append(f"| {name} | {size} | {found['estimate']['total']:,.0f} | {found['peak']:,.0f} | {ratio:.2f} |")
    lines += ["", f"The limit is {LIMIT:.0%} in either direction. A GPU's allocator was not measured.", ""]
    return "\n".join(lines)


def main() -> None:
    """Estimates, runs, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it")
    parser.add_argument("--only", choices=RUNS, action="append", help="leave out the others")
    parser.add_argument("--measure", nargs=2, metavar=("RUN", "FOLDER"), help="used by this script")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind in ("pairs", "prompts"):
            models.rows(8, REPLY, SIZE, kind).to_parquet(folder / f"{kind}.parquet")
        for name in arguments.only or RUNS:
            for shape in ("tiny", RUNS[name][1]):
                save(folder, shape)
            results[name] = compared(name, folder)
            print(json.dumps({name: results[name]}), flush=True)
    print(table(results))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        arguments.output.with_suffix(".md").write_text(table(results), encoding="utf-8")
    if any(abs(found["estimate"]["total"] / found["peak"] - 1) > LIMIT for found in results.values()):
        sys.exit("An estimate is outside its limit.")


def compared(name: str, folder: Path) -> dict:
    """A training in a process of its own, beside its estimate."""
    # Freed memory goes back at once, so that what is resident is what is held.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", "benchmarks.memory.estimate_accuracy", "--measure", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    parameters = sum(
        tensor.numel()
        for tensor in transformers.AutoModelForImageTextToText.from_pretrained(folder / RUNS[name][1]).parameters()
    )
    return {"parameters": parameters, **json.loads(done.stdout.splitlines()[-1]), "estimate": estimated(name, folder)}


if __name__ == "__main__":
    main()
