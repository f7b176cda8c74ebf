"""Which rows of a dataset are kept: those with given values in a column, and a sample of these."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trl_vlm.data.converters.records import Record, Row

NOT_DRAWN = "not in the sample"


@dataclass(frozen=True)
class Where:
    """Rows are kept that have one of the given values in every given column.

    Args:
        values: Column to the values that are kept, as text: `{"hallucination": ["true"]}`.
    """

    values: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses a column without values."""
        if empty := [column for column, values in self.values.items() if not values]:
            raise ValueError(f"`where` names no value for {empty}. Give a list of values for each column.")

    def reason(self, row: Row, record: Record) -> str | None:
        """Why a row is left out, or None.

        Args:
            row: The row; its columns come before those of the record.
            record: What it was made of.

        Raises:
            ValueError: Neither has the column.
        """
        for column, wanted in self.values.items():
            if column not in row and column not in record:
                raise ValueError(
                    f"`where` names the column {column!r}. The row has {sorted(row)}, and its record "
                    f"{sorted(map(str, record))}."
                )
            if as_text(row[column] if column in row else record[column]) not in wanted:
                return f"{column} is not {' or '.join(wanted)}"
        return None


@dataclass(frozen=True)
class Sample:
    """So many rows of a dataset, drawn by the place of their record, the place in it, and a seed.

    The same rows are drawn whatever was read, converted or saved before: the draw depends on nothing else.

    Args:
        rows: How many.
        seed: Of the drawing.
    """

    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses a sample without rows."""
        if self.rows < 1 or self.rows != int(self.rows):
            raise ValueError(f"`sample` is {self.rows}. Give the number of rows to draw.")

    def drawn(self, counts: Iterable[int]) -> frozenset[tuple[int, int]]:
        """The rows that are drawn, as the number of their record and their place in it; all if there are fewer.

        Args:
            counts: How many rows each record makes.
        """
        keys = (
            (self._key(number, place), number, place) for number, count in enumerate(counts) for place in range(count)
        )
        return frozenset((number, place) for _, number, place in heapq.nsmallest(self.rows, keys))

    def _key(self, number: int, place: int) -> bytes:
        return hashlib.sha256(f"{self.seed} {number} {place}".encode()).digest()


@dataclass
class Selection:
    """The rows of a dataset that are kept.

    Args:
        where: Which values they have.
        sample: How many of these are drawn; all if None.
    """

    where: Where = field(default_factory=Where)
    sample: Sample | None = None
    drawn: frozenset[tuple[int, int]] | None = field(default=None, init=False)

    @property
    def identity(self) -> dict[str, object]:
        """What it is, for the settings of a conversion; empty if it keeps everything."""
        found: dict[str, object] = {}
        if self.where.values:
            found["where"] = {column: list(values) for column, values in self.where.values.items()}
        if self.sample is not None:
            found["sample"] = {"rows": self.sample.rows, "seed": self.sample.seed}
        return found

    def draw(self, records: Iterable[Record], rows_of: Callable[[Record], Sequence[Row]]) -> None:
        """Draws the sample, if there is to be one, which reads all records once.

        Args:
            records: All of them, in their order.
            rows_of: The good rows of a record; images need not be there.
        """
        if self.sample is None:
            return
        reason = self.where.reason
        counts = (sum(reason(row, record) is None for row in rows_of(record)) for record in records)
        self.drawn = self.sample.drawn(counts)

    def kept(self, rows: Sequence[Row], record: Record, number: int, dropped: Counter[str]) -> list[Row]:
        """The rows of a record that are kept; the others are counted in `dropped` by reason.

        Args:
            rows: All good rows of the record.
            record: The record.
            number: Its number.
            dropped: Counts by reason.
        """
        reasons = [self.where.reason(row, record) for row in rows]
        dropped.update(reason for reason in reasons if reason is not None)
        kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        if self.drawn is None:
            return kept
        drawn = [row for place, row in enumerate(kept) if (number, place) in self.drawn]
        dropped.update({NOT_DRAWN: len(kept) - len(drawn)} if len(drawn) < len(kept) else {})
        return drawn


def as_text(value: object) -> str:
    """A value as `where` writes it: `true`, `none`, `3`."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
