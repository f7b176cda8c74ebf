"""Pairs whose chosen and rejected replies are equally long on average."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from transformers import AutoTokenizer

from trl_vlm.data.errors import RowError
from trl_vlm.data.messages import reply_text
from trl_vlm.data.rows import ROW_NAME, Row, check_columns, name_of
from trl_vlm.pairs.draws import Draws
from trl_vlm.pairs.source import Policy

logger = logging.getLogger(__name__)

DROPPED = {side: f"dropped for equal lengths, its {side} reply is shorter" for side in ("chosen", "rejected")}


class Lengths(NamedTuple):
    """The lengths of a pair's replies."""

    chosen: int
    rejected: int

    def shortfall(self, side: str) -> float:
        """By how much one reply is shorter than the other, as a share of the other; 0 or less if it is not."""
        short, long = (self.chosen, self.rejected) if side == "chosen" else (self.rejected, self.chosen)
        return (long - short) / long if long else float(-short)


@dataclass(eq=False)
class Balanced:
    """A pair source: the row's own pair, or none where that makes mean lengths agree.

    Where replies of one side are longer on average, DPO learns length before anything else. On the side that is
    shorter on average, pairs are dropped in the order of how much shorter its reply is, as a share of the other one,
    until the means agree. So the longest differences go first, and pairs that lean the other way stay.

    Args:
        tolerance: The means agree if they differ by this share of the rejected replies' mean at most. If no number of
            dropped pairs reaches it, as many are dropped as bring them nearest.
        tokenizer: Folder or hub id, to count tokens; None: lengths are characters.
        seed: Decides between pairs with equal differences.

    Source: RLAIF-V (arXiv:2405.17220) drops pairs whose chosen reply is shorter by more than a ratio, and chooses the
    ratio of fifty by which the means differ least.
    Differs: pairs go one by one, no more than needed, and on either side.
    """

    name: ClassVar[str] = "balance"
    needs_policy: ClassVar[bool] = False

    tolerance: float = field(
        default=0.01, metadata={"help": "Largest difference of the mean lengths, as a share of the rejected one."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of a tokenizer, to count tokens. Without it lengths are characters."},
    )
    seed: int = field(default=0, metadata={"help": "Seed that decides between pairs with equal differences."})
    dropped: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    _unwanted: dict[str, str] | None = field(default=None, init=False, repr=False)  # name of a row -> the shorter side

    def __post_init__(self) -> None:
        """Refuses a tolerance that is none."""
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"`tolerance` is {self.tolerance}; it must be at least 0 and below 1.")

    def survey(self, rows: Iterable[Row]) -> None:
        """Decides which pairs of a dataset are dropped; bad rows have no say.

        Args:
            rows: All of them, with their names.
        """
        length, found = self._length(), dict[str, Lengths]()
        for index, row in enumerate(rows):
            name = name_of(row, index)
            try:
                check_columns(row, ["chosen", "rejected"], name=name)
            except RowError:
                continue  # raised again where its pair is made
            found[name] = Lengths(length(reply_text(row["chosen"])), length(reply_text(row["rejected"])))
        side = _shorter_side(list(found.values()))
        unwanted = dropped_pairs(found, side, tolerance=self.tolerance, seed=self.seed)
        self._unwanted = dict.fromkeys(unwanted, side)
        kept = [lengths for name, lengths in found.items() if name not in self._unwanted]
        logger.info(
            "%d of %d pairs are dropped. Mean lengths (%s): %s before, %s after.",
            len(unwanted),
            len(found),
            "characters" if self.tokenizer is None else "tokens",
            _means(list(found.values())),
            _means(kept),
        )
        if abs(_gap(kept)) > self.tolerance:
            logger.warning("The mean lengths still differ: no choice by these rules brings them nearer.")

    def __call__(self, rows: Sequence[Row], policy: Policy | None = None, round: int = 0) -> list[Row | None]:
        """The rows' own pairs, None for those that are dropped.

        Raises:
            RowError: A row has no pair; the error names it.
            ValueError: `survey` has not seen the dataset.
        """
        if self._unwanted is None:
            raise ValueError(
                "Which pairs are dropped depends on all of them, and `survey` has not seen them. Balance the pairs "
                "once, with `trl-vlm pairs balance`, and train on what it writes."
            )
        pairs: list[Row | None] = []
        for index, row in enumerate(rows):
            check_columns(row, ["chosen", "rejected"], name=name_of(row, index))
            side = self._unwanted.get(row.get(ROW_NAME, ""))
            if side is not None:
                self.dropped[DROPPED[side]] += 1
            pairs.append({**row, "pair_source": row.get("pair_source") or "dataset"} if side is None else None)
        return pairs

    def _length(self) -> Callable[[str], int]:
        if self.tokenizer is None:
            return len
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def dropped_pairs(pairs: dict[str, Lengths], side: str, *, tolerance: float, seed: int) -> list[str]:
    """The names of the pairs that are dropped, see `Balanced`.

    Args:
        pairs: By their names.
        side: Whose replies are shorter on average: "chosen" or "rejected".
        tolerance: See `Balanced`.
        seed: See `Balanced`.
    """
    order = sorted(
        (name for name, lengths in pairs.items() if lengths.shortfall(side) > 0),
        key=lambda name: (-pairs[name].shortfall(side), Draws(seed, 0, name).seed_of("order"), name),
    )
    chosen, rejected = (sum(getattr(lengths, each) for lengths in pairs.values()) for each in Lengths._fields)
    # The gap after each number of dropped pairs; one pair stays.
    gaps = [_relative(chosen, rejected)]
    for name in order[: len(pairs) - 1]:
        chosen, rejected = chosen - pairs[name].chosen, rejected - pairs[name].rejected
        gaps.append(_relative(chosen, rejected))
    enough = (count for count, gap in enumerate(gaps) if abs(gap) <= tolerance)
    nearest = min(range(len(gaps)), key=lambda count: abs(gaps[count]))
    return order[: next(enough, nearest)]


def _relative(chosen: int, rejected: int) -> float:
    """The difference of two sums as a share of the second; of means too, which have one denominator."""
    return (chosen - rejected) / rejected if rejected else float(chosen > 0)


def _gap(pairs: Sequence[Lengths]) -> float:
    return _relative(sum(pair.chosen for pair in pairs), sum(pair.rejected for pair in pairs))


def _shorter_side(pairs: Sequence[Lengths]) -> str:
    return "chosen" if _gap(pairs) < 0 else "rejected"


def _means(pairs: Sequence[Lengths]) -> str:
    count = max(1, len(pairs))
    chosen, rejected = (sum(getattr(pair, side) for pair in pairs) / count for side in Lengths._fields)
    return f"{chosen:.1f} chosen, {rejected:.1f} rejected"
