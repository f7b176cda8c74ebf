"""Work that forks of this process share: they have the model, and nothing is imported or loaded again."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def in_order(work: Callable[[Item], Result], items: Sequence[Item], processes: int = 1) -> Iterator[Iterator[Result]]:
    """The results of `work` in the order of the items; each process is at most one result ahead.

    They are made in this process where a fork could not compute: on an accelerator, or with several threads, which a
    fork does not have.

    Args:
        work: What is done with an item; it must depend on the item alone.
        items: As many as may be needed; what is left when the block ends is not done.
        processes: How many forks share the items.
    """
    if processes == 1 or torch.get_num_threads() > 1 or torch.cuda.is_available():
        yield map(work, items)
        return
    context = multiprocessing.get_context("fork")
    forks, ends = [], []
    try:
        for index in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            fork = context.Process(target=_send, args=(work, items[index::processes], theirs), daemon=True)
            fork.start()
            theirs.close()
            forks.append(fork)
            ends.append(ours)
        yield (ends[place % processes].recv() for place in range(len(items)))
    except EOFError as error:
        raise RuntimeError("A process that shared the work has ended; what it said stands above.") from error
    finally:
        for fork in forks:
            fork.terminate()
            fork.join()


def _send(work: Callable[[Item], Result], items: Sequence[Item], end: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the tokenizer says that it has been forked
    for item in items:
        end.send(work(item))
