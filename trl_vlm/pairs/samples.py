"""Samples of the policy, and the plainest source that they make: the sample is the rejected reply."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trl_vlm.data.encoding import prompt_batches
from trl_vlm.data.rows import Row
from trl_vlm.models.generation import Reply, generated
from trl_vlm.pairs.draws import GumbelSampler
from trl_vlm.pairs.source import Policy, reference_reply, row_draws, row_key

# What a row says about its old replies, and is not true of new ones.
ABOUT_OLD_REPLIES = ("rejected_extra", "chosen_spans", "rejected_spans", "margin")

EMPTY_SAMPLE = "the sample is empty"
SAME_AS_REFERENCE = "the sample is the reference reply"


def sampled_replies(
    rows: Sequence[Row],
    policy: Policy,
    *,
    replies: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    turn: int,
) -> list[list[Reply]]:
    """Several replies of the policy to each row, B lists; each reply has random draws of its own.

    These are samples of softmax(logits / temperature), whatever a checkpoint sets for generation.

    Raises:
        ValueError: A row's image is broken, or does not match its placeholders; the error names the row.
    """
    # Each row stands as often as it has replies: with `num_return_sequences`, LLaVA mixes up the images of a row that
    # has several.
    every = [(row, row_key(row, place)) for place, row in enumerate(rows) for _ in range(replies)]
    draws = [row_draws(row, place, seed, turn) for place, row in enumerate(rows)]
    seeds = [draw.seed_of("reply", reply) for draw in draws for reply in range(replies)]
    batches = prompt_batches(
        policy.processor, [row for row, _ in every], batch_size=len(every), names=[name for _, name in every]
    )
    drawn = generated(policy, batches, max_new_tokens=max_new_tokens, sampler=GumbelSampler(seeds, temperature))
    samples = [reply._replace(text=reply.text.strip()) for reply in drawn]
    return [samples[start : start + replies] for start in range(0, len(samples), replies)]


def preference_row(row: Row, chosen: str, rejected: str, **said: Any) -> dict[str, Any]:
    """The row with new replies; what it said about its old ones is left out.

    Args:
        row: Not modified.
        chosen: Text of the better reply.
        rejected: Text of the worse one.
        said: Columns of the source, without `pair_`.
    """
    kept = {column: value for column, value in row.items() if column not in ABOUT_OLD_REPLIES}
    replies = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {**kept, **replies, **{f"pair_{name}": value for name, value in said.items()}}


class SelfSamples:
    """The reference reply is chosen, and a plain sample of the policy rejected: the control of other sources.

    Args:
        temperature: 0 is greedy decoding.
        max_new_tokens: Longest sample.
        seed: Of the samples.

    Attributes:
        dropped: Why rows gave no pair, counted since the source was made.
    """

    def __init__(self, *, temperature: float = 1.0, max_new_tokens: int = 256, seed: int = 0):
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.dropped: Counter[str] = Counter()

    def __call__(self, rows: Sequence[Row], policy: Policy, turn: int = 0) -> list[Row | None]:
        """Returns a preference row per row; None where the sample is empty or says the same as the reference."""
        references = [reference_reply(row, row_key(row, place)) for place, row in enumerate(rows)]
        samples = sampled_replies(
            rows,
            policy,
            replies=1,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            turn=turn,
        )
        return [
            self._pair(row, reference, sample)
            for row, reference, (sample,) in zip(rows, references, samples, strict=True)
        ]

    def _pair(self, row: Row, reference: str, sample: Reply) -> Row | None:
        if not sample.text or sample.text == reference.strip():
            self.dropped[SAME_AS_REFERENCE if sample.text else EMPTY_SAMPLE] += 1
            return None
        return preference_row(row, reference, sample.text, source="self", unfinished=not sample.is_finished)
