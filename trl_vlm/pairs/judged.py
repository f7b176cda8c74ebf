"""Online DPO: the policy replies several times, and a judge says which reply is better."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from trl_vlm.data.rows import Row
from trl_vlm.judges.judge import Comparison, Judge, Verdict
from trl_vlm.models.generation import Reply
from trl_vlm.pairs.samples import preference_row, sampled_replies
from trl_vlm.pairs.source import Policy


class Decision(NamedTuple):
    """Which of a row's replies are chosen and rejected, by their places, and the verdict that says so."""

    chosen: int
    rejected: int
    verdict: Verdict


class Judged:
    """Pairs of two replies of the policy, of which a judge prefers one.

    With more than two replies the judge compares all of them with each other, and the pair is the one whose net wins
    (wins minus defeats) differ most, among those in which the better record also won the direct comparison; ties go
    to the replies that were drawn first. So two replies give the judge's verdict, and a circle of verdicts no pair.

    Args:
        judge: Compares replies; what it does not decide makes no pair.
        replies: Replies per row, 2 or more; replies * (replies - 1) / 2 comparisons.
        temperature: Of the samples.
        max_new_tokens: Longest reply.
        seed: Of the samples.

    Attributes:
        dropped: Why rows gave no pair, counted since the source was made.

    Source: online DPO in 2407.02477, section 3.
    Differs: the paper does not say how many replies, at which temperature, or what becomes of unclear verdicts.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        replies: int = 2,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ):
        if replies < 2:
            raise ValueError(f"`replies` is {replies}; a judge compares 2 or more.")
        if not temperature > 0:
            raise ValueError(f"`temperature` is {temperature}: every reply would be the same. Use a value above 0.")
        self.judge = judge
        self.replies = replies
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.dropped: Counter[str] = Counter()

    def __call__(self, rows: Sequence[Row], policy: Policy, turn: int = 0) -> list[Row | None]:
        """Returns a preference row per row, or None where the judge did not decide."""
        samples = sampled_replies(
            rows,
            policy,
            replies=self.replies,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            turn=turn,
        )
        places = list(combinations(range(self.replies), 2))
        comparisons = [
            Comparison(row, drawn[first].text, drawn[second].text)
            for row, drawn in zip(rows, samples, strict=True)
            for first, second in places
        ]
        verdicts = self.judge.prefer(comparisons)
        each = [verdicts[start : start + len(places)] for start in range(0, len(verdicts), len(places))]
        return [self._pair(*row) for row in zip(rows, samples, each, strict=True)]

    def _pair(self, row: Row, samples: Sequence[Reply], verdicts: Sequence[Verdict]) -> Row | None:
        decision = best_and_worst(verdicts, self.replies)
        if decision is None:
            self.dropped[
                next((verdict.reason for verdict in verdicts if verdict.reason), "the verdicts go round")
            ] += 1
            return None
        chosen, rejected = samples[decision.chosen], samples[decision.rejected]
        if not (chosen.text and rejected.text):
            self.dropped["a reply is empty"] += 1
            return None
        return preference_row(
            row,
            chosen.text,
            rejected.text,
            source="judged",
            verdict=decision.verdict.text,
            unfinished=not (chosen.is_finished and rejected.is_finished),
        )


def best_and_worst(verdicts: Sequence[Verdict], replies: int) -> Decision | None:
    """The pair that the verdicts about all pairs of `replies` replies leave, see `Judged`; None if there is none.

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
    # `max` keeps the first of equals.
    best = max(won, key=lambda decision: net[decision.chosen] - net[decision.rejected], default=None)
    return best if best is not None and net[best.chosen] > net[best.rejected] else None
