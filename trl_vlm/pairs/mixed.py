"""Sources made of others: the row's own pair, one of two sources by chance, both of them at once."""

from collections import Counter
from collections.abc import Sequence

from trl_vlm.data.rows import ROW_NAME, Row, check_row
from trl_vlm.pairs.source import PairSource, Policy, reference_reply, row_draws, row_key


class Offline:
    """The row's own pair; its chosen reply may also be called `completion`. The policy is not asked."""

    def __call__(self, rows: Sequence[Row], policy: Policy | None = None, turn: int = 0) -> list[Row | None]:
        """Returns the rows with `pair_source` "offline".

        Raises:
            ValueError: A row has no pair; the error names it.
        """
        pairs: list[Row | None] = []
        for place, row in enumerate(rows):
            name = row_key(row, place)
            chosen = row["chosen"] if row.get("chosen") is not None else row.get("completion")
            pair = {**row, "chosen": chosen, "pair_source": "offline"}
            check_row(pair, ["chosen", "rejected"], name=name)
            pairs.append(pair)
        return pairs


class Mixed:
    """Each row's pair comes from one of two sources, by a coin: Mixed-DPO with `Mixed(Offline(), online)`.

    L = alpha L(first) + (1 - alpha) L(second), alpha ~ Bernoulli(share), drawn per row and turn. A source sees only
    the rows that fall to it; with `share` 1 or 0 the other is never called.

    Args:
        first: A source.
        second: Another.
        share: The probability that a row falls to the first.
        seed: Of the coins.

    Source: arXiv:2407.02477, eq. 4.
    """

    def __init__(self, first: PairSource, second: PairSource, *, share: float = 0.5, seed: int = 0):
        if not 0 <= share <= 1:
            raise ValueError(f"`share` is {share}; it is a probability and must lie between 0 and 1.")
        self.first = first
        self.second = second
        self.share = share
        self.seed = seed

    @property
    def dropped(self) -> Counter[str]:
        """Why rows gave no pair, as far as the two sources count it."""
        return _dropped(self.first, self.second)

    def __call__(self, rows: Sequence[Row], policy: Policy, turn: int = 0) -> list[Row | None]:
        """Returns for each row what the source that it fell to made of it."""
        coins = [row_draws(row, place, self.seed, turn).random("mixed").random() for place, row in enumerate(rows)]
        rows = _named(rows)
        pairs: list[Row | None] = [None] * len(rows)
        for source, is_first in ((self.first, True), (self.second, False)):
            places = [place for place, coin in enumerate(coins) if (coin < self.share) == is_first]
            if places:
                made = source([rows[place] for place in places], policy, turn)
                for place, pair in zip(places, made, strict=True):
                    pairs[place] = pair
        return pairs


class BothRejected:
    """Two rejected replies to one chosen reply: the first source's pair, with the second's rejected reply beside it.

    For the averaged loss, w L(y+, y-) + (1 - w) L(y+, y~-), with w the trainer's `rejected_weight`. What the second
    source says in `pair_*` stands in `pair_extra_*`. A row that either source does not decide is None.

    Args:
        first: Gives `chosen` and `rejected`.
        second: Gives the `rejected` that goes into `rejected_extra`, behind those that the first may have put there.

    Source: arXiv:2407.02477, eq. 5.
    """

    def __init__(self, first: PairSource, second: PairSource):
        self.first = first
        self.second = second

    @property
    def dropped(self) -> Counter[str]:
        """Why rows gave no pair, as far as the two sources count it."""
        return _dropped(self.first, self.second)

    def __call__(self, rows: Sequence[Row], policy: Policy, turn: int = 0) -> list[Row | None]:
        """Returns a preference row per row.

        Raises:
            ValueError: The sources chose different replies; the error names the row.
        """
        rows = _named(rows)
        both = zip(self.first(rows, policy, turn), self.second(rows, policy, turn), strict=True)
        return [
            None if first is None or second is None else self._pair(first, second, row[ROW_NAME])
            for row, (first, second) in zip(rows, both, strict=True)
        ]

    def _pair(self, first: Row, second: Row, name: str) -> Row:
        chosen, other = (reference_reply({"chosen": pair["chosen"]}, name).strip() for pair in (first, second))
        if chosen != other:
            raise ValueError(
                f"{name}: the two sources chose different replies, {chosen[:60]!r} and {other[:60]!r}. The averaged "
                "loss has one chosen reply: combine sources that keep the row's own, such as BDHS, POVID and Offline."
            )
        said = {
            column.replace("pair_", "pair_extra_", 1): value
            for column, value in second.items()
            if column.startswith("pair_")
        }
        return {**first, **said, "rejected_extra": [*(first.get("rejected_extra") or ()), second["rejected"]]}


def _dropped(*sources: PairSource) -> Counter[str]:
    """Why rows gave no pair, as far as the sources count it; a function cannot."""
    return sum((Counter(getattr(source, "dropped", ())) for source in sources), Counter())


def _named(rows: Sequence[Row]) -> list[Row]:
    """Rows that carry their names: their draws must not depend on which others a source sees."""
    return [{**row, ROW_NAME: row_key(row, place)} for place, row in enumerate(rows)]
