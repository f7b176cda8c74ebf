"""Time, memory and waits of a GPU; on a CPU the time alone."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def synchronize() -> None:
    """Wait for the GPU."""
    if HAS_GPU:
        torch.cuda.synchronize()


def clean() -> None:
    """Free what is not used any more, and begin to measure memory anew."""
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """The most memory that was held since `clean`."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if HAS_GPU else None


def milliseconds(function: Callable[[], Any], repeats: int = 5, warmup: int = 2) -> float:
    """The median time of a call."""
    for _ in range(warmup):
        function()
    return round(1000 * statistics.median(seconds_of(function) for _ in range(repeats)), 3)


def seconds_of(function: Callable[[], Any]) -> float:
    """The time of one call."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


class StepClock(transformers.TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *arguments: Any, **given: Any) -> None:
        """Starts the clock."""
        synchronize()
        self.seconds.append(time.perf_counter())

    def on_step_end(self, *arguments: Any, **given: Any) -> None:
        """Stops it."""
        synchronize()
        self.seconds[-1] = time.perf_counter() - self.seconds[-1]


def trained(trainer: transformers.Trainer, warmup: int = 3) -> dict[str, Any]:
    """Trains; the median step behind the first ones, the first losses, and peak memory."""
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.remove_callback(transformers.PrinterCallback)
    clean()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = clock.seconds[warmup:] or clock.seconds
    return {
        "seconds_per_step": round(statistics.median(steps), 4),
        "fastest_and_slowest": [round(min(steps), 4), round(max(steps), 4)],
        "peak_gib": peak_gib(),
        "first_losses": [round(float(loss), 5) for loss in losses[:3]],
    }


def host_waits(function: Callable[[], Any]) -> int | None:
    """How often a call makes the host wait for the GPU."""
    if not HAS_GPU:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def clock_calls(owner: Any, name: str, seconds: dict[str, list[float]]) -> None:
    """Writes down how long each call of a method takes."""
    inner = getattr(owner, name)

    def outer(*arguments: Any, **given: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        try:
            return inner(*arguments, **given)
        finally:
            synchronize()
            seconds.setdefault(name, []).append(round(time.perf_counter() - start, 3))

    setattr(owner, name, outer)
