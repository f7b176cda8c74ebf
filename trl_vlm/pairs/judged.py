"""Online DPO: the policy replies several times, and a judge says which reply is better."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import combinations
from typing import ClassVar, NamedTuple

from trl_vlm.data.rows import Row
from trl_vlm.judges.judge import Comparison, Judge, Verdict
from trl_vlm.judges.options import JudgeOptions
from trl_vlm.models.generation import Reply
from trl_vlm.pairs.samples import (
    CACHE_HELP,
    MAX_CACHE_GIB,
    check_cache,
    check_sampling,
    preference_row,
    sampled_replies,
)
from trl_vlm.pairs.source import Policy


class Decision(NamedTuple):
    """Which of a row's replies are chosen and rejected, by their indices, and the verdict that says so."""

    chosen: int
    rejected: int
    verdict: Verdict


@dataclass(eq=False)
class Judged:
    """A pair source: two replies of the policy, of which a judge prefers one.

    With more than two replies the judge compares all of them with each other, and the pair is the one whose net wins
    (wins minus defeats) differ most, among those in which the better record also won the direct comparison; ties go
    to the replies that were drawn first. So two replies give the judge's verdict, and a cycle of verdicts no pair.

    Args:
        judge: Compares replies; a row without a decision gives no pair.
        replies: Replies per row, 2 or more; replies * (replies - 1) / 2 comparisons.
        temperature: Of the samples.
        max_new_tokens: Longest reply.
        max_cache_gib: Most keys and values at once, in GiB.
        best_as_completion: Also put the preferred reply into `completion`, so that the rows train with supervised
            replies as well: best-of-n, or rejection sampling.
        seed: Of the samples.

    Attributes:
        dropped: Why rows gave no pair, counted since the source was made.

    Source: online DPO in 2407.02477, section 3.
    Differs: the paper does not say how many replies, at which temperature, or how unclear verdicts are treated.
    """

    name: ClassVar[str] = "judged"
    needs_policy: ClassVar[bool] = True
    samples_elsewhere: ClassVar[bool] = True
    not_about_answers: ClassVar[frozenset[str]] = frozenset({"max_cache_gib"})

    judge: Judge = field(metadata={"help": "What compares the replies.", "options": JudgeOptions})
    _: KW_ONLY
    replies: int = field(default=2, metadata={"help": "Replies per row, 2 or more."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples, above 0."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest reply, in tokens."})
    max_cache_gib: float = field(default=MAX_CACHE_GIB, metadata={"help": CACHE_HELP})
    best_as_completion: bool = field(
        default=False,
        metadata={"help": "Also put the preferred reply into `completion`, for supervised training on the best of n."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    dropped: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses options that give no two different replies."""
        if self.replies < 2:
            raise ValueError(f"`replies` is {self.replies}; a judge compares 2 or more.")
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature` is {self.temperature}: every reply would be the same. Use a value above 0."
            )
        check_sampling(self.temperature, self.max_new_tokens)
        check_cache(self.max_cache_gib)

    def __call__(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | None]:
        """A preference row per row, or None where the judge did not decide."""
        samples = sampled_replies(
            rows,
            policy,
            replies=self.replies,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            round=round,
            max_cache_gib=self.max_cache_gib,
        )
        indices = list(combinations(range(self.replies), 2))
        comparisons = [
            Comparison(row, drawn[first].text, drawn[second].text)
            for row, drawn in zip(rows, samples, strict=True)
            for first, second in indices
        ]
        verdicts = self.judge.prefer(comparisons)
        verdicts_of_rows = [verdicts[start : start + len(indices)] for start in range(0, len(verdicts), len(indices))]
        return [
            self._pair(row, drawn, verdicts_of_row)
            for row, drawn, verdicts_of_row in zip(rows, samples, verdicts_of_rows, strict=True)
        ]

    def _pair(self, row: Row, samples: Sequence[Reply], verdicts: Sequence[Verdict]) -> Row | None:
        decision = best_and_worst(verdicts, self.replies)
        if decision is None:
            reasons = [verdict.reason for verdict in verdicts if verdict.reason]
            self.dropped[reasons[0] if reasons else "the verdicts go round"] += 1
            return None
        chosen, rejected = samples[decision.chosen], samples[decision.rejected]
        if not (chosen.text and rejected.text):
            self.dropped["a reply is empty"] += 1
            return None
        pair = preference_row(
            row,
            chosen.text,
            rejected.text,
            source=self.name,
            verdict=decision.verdict.text,
            unfinished=not (chosen.is_finished and rejected.is_finished),
        )
        return {**pair, "completion": pair["chosen"]} if self.best_as_completion else pair


def best_and_worst(verdicts: Sequence[Verdict], replies: int) -> Decision | None:
    """The pair that follows from the verdicts on all pairs of `replies` replies, see `Judged`; None if there is none.

    Args:
        verdicts: About (0, 1), (0, 2), ..., (1, 2), ...
        replies: Their number.
    """
    won = []
    net = [0] * replies
    for pair, verdict in zip(combinations(range(replies), 2), verdicts, strict=True):
        if verdict.preferred is not None:
            decision = Decision(pair[verdict.preferred], pair[1 - verdict.preferred], verdict)
            won.append(decision)
            net[decision.chosen] += 1
            net[decision.rejected] -= 1
    # `max` returns the first of equals.
    best = max(won, key=lambda decision: net[decision.chosen] - net[decision.rejected], default=None)
    return best if best is not None and net[best.chosen] > net[best.rejected] else None
