"""Which tokens of two replies differ. Free of torch, so that tools that only look at pairs start quickly.

Source: RLHF-V, arXiv:2312.00849, section 3.1, and the code that trained it (thunlp/Muffin, `utils/diff_lib.py`).
"""

from collections.abc import Sequence
from difflib import Match, SequenceMatcher
from typing import NamedTuple

RUN = 6  # tokens


class ChangedTokens(NamedTuple):
    """Per token of a pair of replies, whether it belongs to a changed segment."""

    chosen: list[bool]
    rejected: list[bool]


def changed_tokens(
    chosen: Sequence[int], rejected: Sequence[int], *, min_match: int = 3, two_sided: bool = False
) -> ChangedTokens:
    """The tokens of two replies that have no counterpart in the other one.

    The replies are aligned by their longest matching blocks. A run of matching tokens shorter than `min_match` does
    not separate two changes: it belongs to the change around it. A run at the very beginning or end of both replies
    counts at any length, because it continues into the prompt, or the end of the text, which both share.

    Args:
        chosen: Token ids of the chosen reply, end-of-reply token included.
        rejected: Token ids of the rejected reply.
        min_match: How many tokens in a row must agree to count as shared.
        two_sided: Count a change only where both replies have tokens, so that a pure insertion or a pure deletion
            does not count. That is what the published code does.

    Returns:
        One list of booleans per reply, True where the token is changed.

    Source: RLHF-V, section 3.1; Muffin, `utils/diff_lib.py`.
    Differs: insertions and deletions count unless `two_sided`: many corrections delete an invented clause, and the
    paper's formula knows no exception for them. difflib's `autojunk` is off: from 200 tokens on it would ignore
    frequent ids. The diff runs on the replies alone, not on prompt, image placeholders and padding.
    """
    is_changed = ChangedTokens([False] * len(chosen), [False] * len(rejected))
    rejected_end = chosen_end = 0
    for block in _shared_blocks(rejected, chosen, min_match):
        in_rejected, in_chosen = range(rejected_end, block.a), range(chosen_end, block.b)
        if (in_rejected and in_chosen) or not two_sided:
            for token in in_rejected:
                is_changed.rejected[token] = True
            for token in in_chosen:
                is_changed.chosen[token] = True
        rejected_end, chosen_end = block.a + block.size, block.b + block.size
    return is_changed


def tokens_in_spans(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], start: int = 0) -> list[bool]:
    """The tokens that touch one of the character spans.

    Args:
        places: For each token, the (start, end) of its characters in the text, end exclusive.
        spans: (start, end) of characters, end exclusive, counted from `start`.
        start: Where in the text the characters of the spans begin to count.
    """
    return [any(first < start + end and start + begin < last for begin, end in spans) for first, last in places]


def weights_in_spans(
    places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, float]], start: int = 0
) -> list[float | None]:
    """The weight of each token that touches a span, the largest of several; None for the other tokens.

    Args:
        places: As for `tokens_in_spans`.
        spans: (start, end, weight).
        start: As for `tokens_in_spans`.
    """
    weights = []
    for first, last in places:
        touched = [weight for begin, end, weight in spans if first < start + end and start + begin < last]
        weights.append(max(touched, default=None))
    return weights


def _shared_blocks(rejected: Sequence[int], chosen: Sequence[int], min_match: int) -> list[Match]:
    """The matching blocks that count, with difflib's empty block at the end."""
    *blocks, end = matching_blocks(rejected, chosen)

    def counts(block: Match) -> bool:
        at_start = block.a == block.b == 0
        at_end = block.a + block.size == end.a and block.b + block.size == end.b
        return block.size >= min_match or at_start or at_end

    return [*filter(counts, blocks), end]


def matching_blocks(first: Sequence[int], second: Sequence[int]) -> list[Match]:
    """What `SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()` returns, several times faster.

    The longest block of tokens is the longest block of runs of `RUN` tokens, of which far fewer are equal. Where no
    run is left, difflib compares the tokens that are.
    """
    runs = SequenceMatcher(None, _runs(first), _runs(second), autojunk=False)
    left = [(0, len(first), 0, len(second))]
    blocks: list[Match] = []
    while left:
        start, end, other_start, other_end = left.pop()
        longest = Match(start, other_start, 0)
        if min(end - start, other_end - other_start) >= RUN:
            longest = runs.find_longest_match(start, end - RUN + 1, other_start, other_end - RUN + 1)
        if not longest.size:
            rest = SequenceMatcher(None, first[start:end], second[other_start:other_end], autojunk=False)
            found = rest.get_matching_blocks()[:-1]
            blocks += [Match(start + block.a, other_start + block.b, block.size) for block in found]
            continue
        block = longest._replace(size=longest.size + RUN - 1)
        blocks.append(block)
        if start < block.a and other_start < block.b:
            left.append((start, block.a, other_start, block.b))
        if block.a + block.size < end and block.b + block.size < other_end:
            left.append((block.a + block.size, end, block.b + block.size, other_end))
    return [*sorted(blocks), Match(len(first), len(second), 0)]


def _runs(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[start:] for start in range(RUN)), strict=False))
