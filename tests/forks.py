"""Children of the test's own process: cheaper than new interpreters, for everything is imported already."""

import os
import socket
import traceback
from collections.abc import Callable

from accelerate.state import AcceleratorState


def fork(work: Callable[[], object], **environment: str) -> int:
    """A child of this process that does `work` and ends; its number."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ.update(environment)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finished(child: int) -> int:
    """The exit code of a child, once it has ended."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def fork_group(work: Callable[[], object], processes: int = 2) -> list[int]:
    """The exit codes of children that do `work` as the processes of one run, each in a state of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def alone() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        work()

    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    children = [fork(alone, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(processes)]
    return [finished(child) for child in children]
