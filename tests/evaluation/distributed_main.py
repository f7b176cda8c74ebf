"""Evaluates a model on all processes: data, output, model, and after how many savings it is killed (-1: never)."""

import os
import signal
import sys
from pathlib import Path

from accelerate import PartialState

from trl_vlm.evaluation.benchmarks import BENCHMARKS
from trl_vlm.evaluation.ledger import Ledger
from trl_vlm.evaluation.run import RunSettings, run_benchmarks
from trl_vlm.evaluation.subjects import Subject

data, output, model, kill_after = sys.argv[1:]
state = PartialState(cpu=True)
append, calls = Ledger.append, []


def appends(self, entries):
    calls.append(1)
    if len(calls) - 1 == int(kill_after) and state.process_index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, entries)


Ledger.append = appends
settings = RunSettings(Path(data), Path(output), max_new_tokens=5, batch_size=1, progress=False)
run_benchmarks([Subject("tiny", model)], [BENCHMARKS["pope"], BENCHMARKS["chair"]], settings)
state.destroy_process_group()
