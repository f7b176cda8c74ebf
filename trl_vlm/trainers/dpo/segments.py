"""The segments of a batch of pairs: which tokens are changed, and the weights that rows give themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_vlm.data.faults import span_fault
from trl_vlm.data.messages import message_text
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.maths.changed_tokens import changed_tokens, weights_in_spans
from trl_vlm.trainers.dpo.spans import token_places

# Batch keys, see `Segments`.
CHANGED: Final = "changed_tokens"
TOKEN_WEIGHTS: Final = "token_weights"
SCORE_WEIGHTS: Final = "score_weights"


@dataclass(frozen=True)
class SegmentOptions:
    """How changed tokens are found; see `trl_vlm.maths.changed_tokens.changed_tokens`."""

    min_match: int = 3
    two_sided: bool = False


class Segments(NamedTuple):
    """What Dense DPO reads of a batch with K replies to each of P rows; one entry per pair of chosen and rejected.

    Args:
        is_changed: (K - 1, 2 * P, T - 1), bool, aligned with the log-probabilities that TRL computes, so token t is at
            t - 1.
        token_weights: (K - 1, 2 * P, T - 1), nan where a row gives none; None if no row of the batch gives any.
        score_weights: (K - 1, 2 * P), likewise.
    """

    is_changed: Tensor
    token_weights: Tensor | None = None
    score_weights: Tensor | None = None

    @classmethod
    def taken_from(cls, batch: dict[str, Any]) -> "Segments | None":
        """The segments of a batch, whose keys are removed from it; None without Dense DPO."""
        is_changed = batch.pop(CHANGED, None)
        weights = batch.pop(TOKEN_WEIGHTS, None), batch.pop(SCORE_WEIGHTS, None)
        return None if is_changed is None else cls(is_changed, *weights)

    def of_pair(self, number: int) -> dict[str, Tensor | None]:
        """The arguments of `DenseScore.apply` for one of the K - 1 pairs."""
        return {name: None if value is None else value[number] for name, value in self._asdict().items()}

    def of_chosen(self) -> dict[str, Tensor | None]:
        """The same for the chosen replies twice, as they stand beside the first rejected ones."""
        rows = self.is_changed.size(1) // 2
        first = {name: None if value is None else value[0, :rows] for name, value in self._asdict().items()}
        return {name: None if value is None else torch.cat([value, value]) for name, value in first.items()}


def segments_of(
    batch: Mapping[str, Tensor],
    rows: Sequence[Mapping[str, Any]],
    options: SegmentOptions,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Tensor]:
    """The keys of `Segments` for a batch.

    Args:
        batch: (K * P, T), `input_ids` and `completion_mask`.
        rows: P, with their names.
        options: How changed tokens are found.
        tokenizer: Decodes replies to find characters.

    Raises:
        ValueError: A span or a weight is bad; the error names the row.
    """
    count, is_reply = len(rows), batch["completion_mask"].bool()
    pairs = len(is_reply) // count - 1
    replies = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], is_reply, strict=True)]
    is_changed = torch.zeros(pairs, 2 * count, is_reply.size(1), dtype=torch.bool)
    weights = torch.full(is_changed.shape, torch.nan)
    for pair in range(pairs):
        for row in range(count):
            other = (pair + 1) * count + row
            found = changed_tokens(
                replies[row], replies[other], min_match=options.min_match, two_sided=options.two_sided
            )
            for place, sequence, changed in ((row, row, found.chosen), (count + row, other, found.rejected)):
                column = "chosen" if place == row else "rejected"
                given = _in_spans(rows[row], column, replies[sequence], tokenizer) if pair == 0 else None
                if given is not None:
                    changed = [weight is not None for weight in given]
                    own = [torch.nan if weight is None else weight for weight in given]
                    weights[pair, place, is_reply[sequence]] = torch.tensor(own)
                is_changed[pair, place, is_reply[sequence]] = torch.tensor(changed)
    keys = {CHANGED: is_changed[:, :, 1:]}
    if not weights.isnan().all():
        keys[TOKEN_WEIGHTS] = weights[:, :, 1:]
    return keys | _score_weights(rows, pairs)


def _score_weights(rows: Sequence[Mapping[str, Any]], pairs: int) -> dict[str, Tensor]:
    """`SCORE_WEIGHTS` of the rows; {} if none gives any. Those of `rejected` are of the first pair alone."""
    values = [[row.get(f"{side}_score_weight") for row in rows] for side in ("chosen", "rejected")]
    if all(value is None for side in values for value in side):
        return {}
    chosen, rejected = ([1.0 if value is None else float(value) for value in side] for side in values)
    further = [1.0] * len(rows)
    return {SCORE_WEIGHTS: torch.tensor([chosen + (further if pair else rejected) for pair in range(pairs)])}


def _in_spans(
    row: Mapping[str, Any], column: str, ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[float | None] | None:
    """For each token the weight of the row's character spans: None outside of them, nan where they have none.

    None if the row has no spans.
    """
    spans = row.get(f"{column}_spans")
    if spans is None:
        return None
    reply = row[column]
    reply = reply if isinstance(reply, str) else message_text(reply[-1])
    name = f"{row[ROW_NAME]}, column '{column}_spans'"
    reason = next((reason for span in spans if (reason := span_fault(span, len(reply))) is not None), None)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    text, places = token_places(tokenizer, ids)
    # A chat template may strip the white space around a reply.
    start = text.find(reply.strip())
    if start < 0:
        raise ValueError(
            f"{name}: the reply's tokens do not decode to its text, so characters cannot be assigned to them. Was "
            "it cut by `max_length`, or changed by the chat template? Without spans they are found by comparison."
        )
    start -= len(reply) - len(reply.lstrip())
    weighted = [(int(first), int(last), rest[0] if rest else torch.nan) for first, last, *rest in spans]
    return weights_in_spans(places, weighted, start)
