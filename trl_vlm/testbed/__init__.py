"""A small world in which hallucination can be measured: scenes, a tiny model that hallucinates, exact truth.

The names below load on first use: looking at pictures needs neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "JUDGE_TEMPLATE": "processor",
    "SupervisedSettings": "supervised",
    "World": "world",
    "build_model": "model",
    "build_processor": "processor",
    "find_objects": "oracle",
    "train_supervised": "supervised",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It offers: {', '.join(__all__)}.")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
