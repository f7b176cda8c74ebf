"""Attributes of an object for the time of a context."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def with_attributes(owner: object, **values: object) -> Iterator[None]:
    """A context in which `owner` has these values, and afterwards those that it had before."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
