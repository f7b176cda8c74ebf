"""Runs a training script on one process, under DDP or under DeepSpeed, on the CPU, and returns what it reports.

The script is a Python file whose `main(folder, trainer_arguments, **arguments) -> tuple[Trainer, dict]` trains and
returns the trainer and a JSON-able report; `trainer_arguments` must go into its training arguments. Models are made
by the test and named in `arguments`: in the script only the first process could save them. The launcher asserts that
the world has the size and the kind that were asked for: several launchers fall back to one process without a word.

    report = launch("tests/trainers/reward/distributed_main.py", "zero2", processes=2, folder=tmp_path, batch=2)
"""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTED_TYPES = {
    "single": "NO",
    "ddp": "MULTI_CPU",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
    "fsdp2": "FSDP",
}
TIMEOUT_SECONDS = 540


def launch(
    script: str | Path, kind: str, *, processes: int, folder: Path, mixed_precision: str = "no", **arguments
) -> dict:
    """The report of process 0 of `script`, run as `kind` (single, ddp, zero2, zero3, fsdp2) on several processes.

    Args:
        script: Path of the script, from the root of the repository.
        kind: One of `DISTRIBUTED_TYPES`.
        processes: World size.
        folder: An empty folder for the script's files.
        mixed_precision: "no" or "bf16".
        arguments: JSON-able, passed to the script's `main` as keywords.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = folder / "task.json"
    description = {"script": str(script), "kind": kind, "folder": str(folder), "arguments": arguments}
    task.write_text(json.dumps({**description, "bf16": mixed_precision == "bf16"}))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # hundreds of them would hide the error
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [*_command(kind, processes, mixed_precision), str(Path(__file__)), str(task)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, (
        f"{kind}, {processes} processes: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    )
    report = json.loads((folder / "report.json").read_text())
    assert report["processes"] == processes, f"{kind}: {report['processes']} processes ran, not {processes}"
    assert report["distributed_type"] == DISTRIBUTED_TYPES[kind], f"{kind} ran as {report['distributed_type']}"
    assert report["mixed_precision"] == mixed_precision, f"{kind} ran with {report['mixed_precision']}"
    if kind.startswith("zero"):
        assert report["zero_stage"] == int(kind[-1])
    return report


def _command(kind: str, processes: int, mixed_precision: str) -> list[str]:
    if kind == "single":
        assert processes == 1
        return [sys.executable]
    port = str(_free_port())
    if kind == "ddp":
        module = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
        return [sys.executable, *module]
    launcher = [
        *[sys.executable, "-m", "accelerate.commands.launch", "--dynamo_backend", "no"],
        *["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", port],
        *["--mixed_precision", mixed_precision],
    ]
    if kind == "fsdp2":  # as accelerate_configs/fsdp2.yaml has it
        return [
            *launcher,
            *["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"],
            *["--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "true"],
            *["--fsdp_reshard_after_forward", "true"],
        ]
    return [*launcher, "--use_deepspeed", "--zero_stage", kind[-1], "--zero3_save_16bit_model", "true"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _let_fsdp_run_on_cpus() -> None:
    """accelerate gives its FSDP plugin to runs of kind MULTI_GPU alone; torch's FSDP2 itself runs over gloo."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    make = AcceleratorState.__init__

    def with_fsdp(self, *args, **kwargs):
        if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make(self, *args, **kwargs)

    AcceleratorState.__init__ = with_fsdp


def _run(task: Path) -> None:
    """What each process does."""
    description = json.loads(task.read_text())
    if description["kind"].startswith("zero"):
        import deepspeed  # noqa: F401  its communication module is imported with it

        # The operator would be compiled (a minute, and a toolchain); gloo does without it.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    if description["kind"] == "fsdp2":
        _let_fsdp_run_on_cpus()
    main = runpy.run_path(str(ROOT / description["script"]))["main"]
    trainer, report = main(
        folder=Path(description["folder"]),
        trainer_arguments={"use_cpu": True, "bf16": description["bf16"]},
        **description["arguments"],
    )
    accelerator = trainer.accelerator
    plugin = accelerator.state.deepspeed_plugin
    report = {
        **report,
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "zero_stage": plugin.zero_stage if plugin is not None else None,
        "mixed_precision": accelerator.mixed_precision,
    }
    if accelerator.is_main_process:
        (Path(description["folder"]) / "report.json").write_text(json.dumps(report))
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()  # a process that exits with the group open can take the other one along


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
