"""The row's own pair, and sources made of others: one of two by chance, or both at once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, NamedTuple

from trl_vlm.data.errors import RowError
from trl_vlm.data.rows import ROW_NAME, Row, check_columns, name_of
from trl_vlm.pairs.source import (
    Deferred,
    PairSource,
    Policy,
    begin_pairs,
    finish_pairs,
    reference_reply,
    row_draws,
)


@dataclass(eq=False)
class DatasetPairs:
    """A pair source: the row's own pair; its chosen reply may also be called `completion`. The policy is not used."""

    name: ClassVar[str] = "dataset"
    needs_policy: ClassVar[bool] = False

    def __call__(self, rows: Sequence[Row], policy: Policy | None = None, round: int = 0) -> list[Row | None]:
        """The rows with `pair_source` "dataset".

        Raises:
            ValueError: A row has no pair; the error names it.
        """
        pairs: list[Row | None] = []
        for index, row in enumerate(rows):
            chosen = row["chosen"] if row.get("chosen") is not None else row.get("completion")
            pair = {**row, "chosen": chosen, "pair_source": self.name}
            check_columns(pair, ["chosen", "rejected"], name=name_of(row, index))
            pairs.append(pair)
        return pairs


@dataclass(eq=False)
class MixedPairs:
    """Each row's pair comes from one of two sources by chance: Mixed DPO with `MixedPairs(DatasetPairs(), online)`.

    L = alpha L(first) + (1 - alpha) L(second), alpha ~ Bernoulli(probability), drawn per row and round. A source sees
    only the rows that are drawn for it; with `probability` 1 or 0 the other is never called.

    Args:
        first: A source.
        second: Another.
        probability: Probability of the first source, per row.
        seed: Of the draws.

    Source: arXiv:2407.02477, eq. 4.
    """

    name: ClassVar[str] = "mixed"
    needs_policy: ClassVar[bool] = True

    first: PairSource = field(metadata={"help": "A source."})
    second: PairSource = field(metadata={"help": "Another source."})
    _: KW_ONLY
    probability: float = field(default=0.5, metadata={"help": "Probability of the first source, per row."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})

    def __post_init__(self) -> None:
        """Refuses a value that is no probability."""
        if not 0 <= self.probability <= 1:
            raise ValueError(f"`probability` is {self.probability}; it must lie between 0 and 1.")

    @property
    def dropped(self) -> Counter[str]:
        """Why rows gave no pair, as far as the two sources count it."""
        return _dropped(self.first, self.second)

    @property
    def samples_elsewhere(self) -> bool:
        """Whether one of the sources can take its samples from an engine."""
        return _samples_elsewhere(self.first, self.second)

    def __call__(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | None]:
        """The result for each row, from the source that was drawn for it."""
        return finish_pairs(self.begin(rows, policy, round), policy)

    def begin(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | Deferred | None]:
        """As a call, with what the sources leave for later."""
        draws = [row_draws(row, index, self.seed, round).random("mixed").random() for index, row in enumerate(rows)]
        rows = _named(rows)
        pairs: list[Row | Deferred | None] = [None] * len(rows)
        for source, is_first in ((self.first, True), (self.second, False)):
            indices = [index for index, draw in enumerate(draws) if (draw < self.probability) == is_first]
            if indices:
                pairs_of_source = begin_pairs(source, [rows[index] for index in indices], policy, round)
                for index, pair in zip(indices, pairs_of_source, strict=True):
                    pairs[index] = pair
        return pairs


@dataclass(eq=False)
class CombinedRejected:
    """Two rejected replies to one chosen reply: the first source's pair, with the second's rejected reply beside it.

    For the averaged loss, w L(y+, y-) + (1 - w) L(y+, y~-), with w the trainer's `rejected_weight`. What the second
    source reports in `pair_*` becomes `pair_extra_*`. A row for which either source has no decision gives None.

    Args:
        first: Gives `chosen` and `rejected`.
        second: Gives the `rejected` that goes into `rejected_extra`, after those of the first source.

    Source: arXiv:2407.02477, eq. 5.
    """

    name: ClassVar[str] = "combined"
    needs_policy: ClassVar[bool] = True

    first: PairSource = field(metadata={"help": "Gives the chosen and the first rejected reply."})
    second: PairSource = field(metadata={"help": "Gives the further rejected reply."})

    @property
    def dropped(self) -> Counter[str]:
        """Why rows gave no pair, as far as the two sources count it."""
        return _dropped(self.first, self.second)

    @property
    def samples_elsewhere(self) -> bool:
        """Whether one of the sources can take its samples from an engine."""
        return _samples_elsewhere(self.first, self.second)

    def __call__(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | None]:
        """A preference row per row.

        Raises:
            ValueError: The sources chose different replies; the error names the row.
        """
        return finish_pairs(self.begin(rows, policy, round), policy)

    def begin(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | Deferred | None]:
        """As a call, with rows for later that one of the sources leaves for later."""
        rows = _named(rows)
        firsts, seconds = (begin_pairs(source, rows, policy, round) for source in (self.first, self.second))
        both = [_Both(row[ROW_NAME], *entries) for row, *entries in zip(rows, firsts, seconds, strict=True)]
        return [
            Deferred(self._finished, each)
            if isinstance(each.first, Deferred) or isinstance(each.second, Deferred)
            else self._finished([each], policy)[0]
            for each in both
        ]

    def _finished(self, both: Sequence["_Both"], policy: Policy) -> list[Row | None]:
        firsts = finish_pairs([each.first for each in both], policy)
        seconds = finish_pairs([each.second for each in both], policy)
        return [
            None if first is None or second is None else self._pair(first, second, each.name)
            for each, first, second in zip(both, firsts, seconds, strict=True)
        ]

    def _pair(self, first: Row, second: Row, name: str) -> Row:
        chosen, other = (reference_reply({"chosen": pair["chosen"]}, name).strip() for pair in (first, second))
        if chosen != other:
            raise RowError(
                f"{name}: the two sources chose different replies, {chosen[:60]!r} and {other[:60]!r}. The averaged "
                "loss has one chosen reply: combine sources that keep the row's own, such as BDHS, POVID and "
                "DatasetPairs."
            )
        metadata = {
            column.replace("pair_", "pair_extra_", 1): value
            for column, value in second.items()
            if column.startswith("pair_")
        }
        return {**first, **metadata, "rejected_extra": [*(first.get("rejected_extra") or ()), second["rejected"]]}


class _Both(NamedTuple):
    """What two sources gave for the row called `name`."""

    name: str
    first: Row | Deferred | None
    second: Row | Deferred | None


def _samples_elsewhere(*sources: PairSource) -> bool:
    """Whether a source can take its samples from an engine; only those that can say so."""
    return any(getattr(source, "samples_elsewhere", False) for source in sources)


def _dropped(*sources: PairSource) -> Counter[str]:
    """Why rows gave no pair, as far as the sources count it; a function cannot."""
    dropped: Counter[str] = Counter()
    for source in sources:
        dropped.update(getattr(source, "dropped", ()))
    return dropped


def _named(rows: Sequence[Row]) -> list[Row]:
    """Rows with their names: their draws must not depend on which other rows a source sees."""
    return [{**row, ROW_NAME: name_of(row, index)} for index, row in enumerate(rows)]
