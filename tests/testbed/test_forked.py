"""Forks that share work: results in order, no more work than is needed, and an end of all of them."""

import multiprocessing
import os
import time

import pytest
import torch

from trl_vlm.testbed.datasets import preference_rows
from trl_vlm.testbed.forked import in_order
from trl_vlm.testbed.world import World


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_other_processes_which_then_end():
    def slow_at_first(item):
        time.sleep(0.2 if item == 0 else 0)
        return item, os.getpid()

    with in_order(slow_at_first, range(1000), processes=2) as results:
        first = [next(results) for _ in range(6)]
    assert [item for item, _ in first] == list(range(6))
    assert len({process for _, process in first} - {os.getpid()}) == 2
    assert not multiprocessing.active_children()


def test_one_process_or_several_threads_work_here():
    with in_order(lambda item: os.getpid(), range(3)) as results:
        assert set(results) == {os.getpid()}
    torch.set_num_threads(2)
    with in_order(lambda item: os.getpid(), range(3), processes=2) as results:
        assert set(results) == {os.getpid()}


def test_a_fork_that_fails_is_told(capfd):
    def fails(item):
        raise ValueError(f"item {item}")

    message = "A process that shared the work has ended"
    with pytest.raises(RuntimeError, match=message), in_order(fails, range(3), processes=2) as results:
        list(results)
    assert "ValueError: item 0" in capfd.readouterr().err


def test_preference_rows_are_the_same_with_several_processes():
    world = World(seed=0)

    def sample(images, seed):
        return [f"i see a {world.kinds[(seed + place) % len(world.kinds)]} ." for place in range(len(images))]

    alone, shared = (preference_rows(world, 300, 1, sample, vision_noise=0.5, processes=count) for count in (1, 2))
    assert alone.to_list() == shared.to_list() and len(alone) == 300
