"""What is raised for a row that cannot be used, and for nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager


class RowError(ValueError):
    """A row breaks the row contract, or one of its images is bad; the message names the row and the remedy.

    Only such errors may be skipped, row by row; any other `ValueError` (an endpoint, a cache, an option) ends a run.

    Args:
        message: What came, what was needed, what to do.
        kind: The same few words for every row with this fault, to count by.
    """

    def __init__(self, message: str, kind: str = "other"):
        super().__init__(message)
        self.kind = kind


class RowTypeError(RowError, TypeError):
    """A row holds a value of the wrong type."""


class BadRecord(RowError):
    """A record that cannot become a row.

    Args:
        reason: The kind of fault, in the same few words for every record that has it: skips are counted by it.
        detail: What is special about this record.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason, reason)
        self.reason = reason
        self.detail = detail


@contextmanager
def as_row_errors() -> Iterator[None]:
    """Within this context a `ValueError` is about a row, and leaves it as a `RowError`."""
    try:
        yield
    except RowError:
        raise
    except ValueError as error:
        raise RowError(str(error)) from error
