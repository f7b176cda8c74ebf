"""Evaluates models and replies, killed at random moments and resumed: a JSON file of what, and how often.

Imports are paid once: each run is a fork of this process. A moment is a write that reaches the disk, before or after
it does; the whole process group is killed there with SIGKILL, so that nobody can tidy up.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import peft  # noqa: F401  imported once, before the forks

from trl_vlm.evaluation import ledger
from trl_vlm.evaluation.benchmarks import BENCHMARKS
from trl_vlm.evaluation.run import RunSettings, run_benchmarks
from trl_vlm.evaluation.subjects import Subject

KILLS = 3
LATEST = 6  # write of a run at which it is killed; to score and to report takes as many, so each run comes to it


def killed_at(moment: int, is_before: bool) -> None:
    """This process's group is killed at a write of this process."""
    fsync, writes = os.fsync, []
    ledger.SECONDS_BETWEEN_SYNCS = 0  # each write of replies and answers is such a moment

    def dies(file: int) -> None:
        writes.append(file)
        if len(writes) == moment and is_before:
            os.killpg(0, signal.SIGKILL)
        fsync(file)
        if len(writes) == moment:
            os.killpg(0, signal.SIGKILL)

    os.fsync = dies


def evaluate(task: dict, output: str, batch_size: int) -> None:
    settings = RunSettings(
        Path(task["data"]), Path(output), max_new_tokens=5, batch_size=batch_size, progress=False, dtype="float32"
    )
    replies = Path(task["replies"]) if task["replies"] else None
    run_benchmarks([Subject(task["name"], task["path"], replies)], [BENCHMARKS["pope"], BENCHMARKS["chair"]], settings)


def forked(task: dict, output: str, processes: int, batch_size: int, kill: tuple[int, bool] | None) -> list[int]:
    """The exit codes of the processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[int] = []
    home = os.getpgid(0)
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            if processes > 1:
                os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
            while os.getpgid(0) == home:  # until it is in the group that is killed
                time.sleep(0.001)
            run_and_exit(task, output, batch_size, kill if rank == 0 else None)
        os.setpgid(child, children[0] if children else child)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run_and_exit(task: dict, output: str, batch_size: int, kill: tuple[int, bool] | None) -> None:
    code = 1
    try:
        from accelerate import PartialState

        state = PartialState(cpu=True)
        if kill is not None:
            killed_at(*kill)
        evaluate(task, output, batch_size)
        state.destroy_process_group()
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    rng = random.Random(given["seed"])
    codes: dict[str, list[list[int]]] = {}
    for task in given["tasks"]:
        folder = f"{given['output']}/{task['name']}"
        codes[f"{task['name']}, alone"] = [forked(task, f"{folder}/alone", 1, 1, None)]
        for processes in (1, 2):
            place = f"{folder}/{processes}"
            kills = [(rng.randint(1, LATEST), rng.random() < 0.5) for _ in range(KILLS)]
            runs = [forked(task, place, processes, 3, kill) for kill in [*kills, None]]
            codes[f"{task['name']}, {processes}"] = runs
    Path(given["output"], "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
