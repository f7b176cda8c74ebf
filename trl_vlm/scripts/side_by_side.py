"""Parts of a script that do not need each other, each in a process of its own, at the same time."""

import io
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import TextIO


@contextmanager
def side_by_side(parts: Mapping[str, Callable[[], Callable[[], None]]]) -> Iterator[Callable[[], None]]:
    """Starts a process for each part, which prepares it, and waits until it is told to begin.

    The block gets a function that lets all begin; at its end all have finished. The processes end with this one,
    however it ends. What they print has their name before each line.

    Args:
        parts: Name to a function that another process can import, with its arguments (`functools.partial`). It
            prepares what needs no other part, and returns what is run once all are told to begin.

    Raises:
        SystemExit: One of them failed, and has said why; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    begin = context.Event()
    processes = [context.Process(target=_run, args=(name, part, begin), name=name) for name, part in parts.items()]
    try:
        for process in processes:
            process.start()
        yield begin.set
        begin.set()
        _wait(processes)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()


class NamedLines(io.TextIOBase):
    """Writes whole lines to a stream, each with a name before it. It is no terminal, so that nothing draws bars.

    Args:
        name: Of whoever writes.
        stream: Where the lines go.
    """

    def __init__(self, name: str, stream: TextIO):
        self._start, self._stream, self._line = f"{name} | ", stream, ""

    def write(self, text: str, /) -> int:
        """Keeps the text until its line ends."""
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            # A carriage return begins the line anew.
            self._stream.write("".join(f"{self._start}{line.rpartition(chr(13))[2]}\n" for line in lines))
            self._stream.flush()
        return len(text)


def _run(name: str, part: Callable[[], Callable[[], None]], begin: Event) -> None:
    """In the other process: runs a part, unless the process that started it ends first."""
    sys.stdout = sys.stderr = NamedLines(name, sys.stderr)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work = part()
    begin.wait()
    work()


def _end_with_parent() -> None:
    """Ends this process when the one that started it has gone, were it by `kill -9`."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this process was started by another
    connection.wait([parent.sentinel])
    os._exit(1)


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Waits for all processes.

    Raises:
        SystemExit: One of them failed.
    """
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in connection.wait(list(running)):
            process = running.pop(sentinel)  # type: ignore[index]  # what it returns is what it got
            process.join()
            if process.exitcode:
                raise SystemExit(
                    f"error: {process.name} ended with exit code {process.exitcode}. What it had done is kept: the "
                    "same command goes on from there."
                )
