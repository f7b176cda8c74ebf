"""Samples of the policy, and the simplest source made of them: a sample is the rejected reply."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from trl_vlm.data.encoding import prompt_batches
from trl_vlm.data.rows import ABOUT_PAIR_COLUMNS, Row, name_of
from trl_vlm.models.generation import Policy, Reply, SampledElsewhere, generated
from trl_vlm.models.memory import GIB, keys_and_values
from trl_vlm.models.sampling import GumbelSampler
from trl_vlm.pairs.source import reference_reply, row_draws

EMPTY_SAMPLE = "the sample is empty"
SAME_AS_REFERENCE = "the sample is the reference reply"

# Keys and values at once: some 80 sentences of LLaVA-1.5-7B, which has the largest of its size (0.5 MiB a token).
MAX_CACHE_GIB = 8.0
CACHE_HELP = "Most keys and values at once, in GiB; replies that need more are made in turns."


def sampled_replies(
    rows: Sequence[Row],
    policy: Policy,
    *,
    replies: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    round: int,
    max_cache_gib: float = MAX_CACHE_GIB,
) -> list[list[Reply]]:
    """Several replies of the policy to each row, B lists; each reply has random draws of its own.

    These are samples of softmax(logits / temperature), whatever a checkpoint sets for generation. A policy with an
    engine of its own for samples (vLLM) draws them there.

    Raises:
        ValueError: A row's image is broken, or does not match its placeholders; the error names the row.
    """
    # Each row is repeated for each of its replies: with `num_return_sequences`, LLaVA mixes up the images of a row
    # that has several.
    repeated = [row for row in rows for _ in range(replies)]
    names = [name_of(row, index) for index, row in enumerate(rows) for _ in range(replies)]
    draws = [row_draws(row, index, seed, round) for index, row in enumerate(rows)]
    seeds = [draw.seed_of("reply", reply) for draw in draws for reply in range(replies)]
    if isinstance(policy, SampledElsewhere):
        drawn = policy.engine.replies(
            repeated, names, seeds=seeds, temperature=temperature, max_new_tokens=max_new_tokens
        )
    else:
        batches = batches_within(policy, repeated, names, max_new_tokens, max_cache_gib * GIB)
        drawn = generated(policy, batches, max_new_tokens=max_new_tokens, sampler=GumbelSampler(seeds, temperature))
    samples = [reply._replace(text=reply.text.strip()) for reply in drawn]
    return [samples[start : start + replies] for start in range(0, len(samples), replies)]


def batches_within(
    policy: Policy, rows: Sequence[Row], names: Sequence[str], max_new_tokens: int, most_bytes: float
) -> Iterator[dict[str, Tensor]]:
    """The prompts of rows in batches whose keys and values, with replies, need at most so many bytes.

    One row is a batch however much it needs.
    """
    if not rows:
        return
    (batch,) = prompt_batches(policy.processor, rows, batch_size=len(rows), names=names)
    tokens = len(rows) * (batch["input_ids"].size(1) + max_new_tokens)
    needed = keys_and_values(policy.model.config.get_text_config(), tokens, policy.model.dtype.itemsize)
    if needed <= most_bytes or len(rows) == 1:
        yield batch
        return
    del batch
    half = len(rows) // 2
    for part in (slice(half), slice(half, None)):
        yield from batches_within(policy, rows[part], names[part], max_new_tokens, most_bytes)


def preference_row(row: Row, chosen: str, rejected: str, **metadata: Any) -> dict[str, Any]:
    """The row with new replies, without the columns that describe its old ones.

    Args:
        row: Not modified.
        chosen: Text of the better reply.
        rejected: Text of the worse one.
        metadata: What the source reports, for columns `pair_<name>`.
    """
    kept = {column: value for column, value in row.items() if column not in ABOUT_PAIR_COLUMNS}
    replies = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {**kept, **replies, **{f"pair_{name}": value for name, value in metadata.items()}}


def check_sampling(temperature: float, max_new_tokens: int) -> None:
    """Raises ValueError if an option of sampling is out of range."""
    if not temperature >= 0:
        raise ValueError(f"`temperature` is {temperature}; it must be 0 (greedy) or more.")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {max_new_tokens}; it must be 1 or more.")


def check_cache(max_cache_gib: float) -> None:
    """Raises ValueError if a limit of memory is no positive number."""
    if not max_cache_gib > 0:
        raise ValueError(f"`max_cache_gib` is {max_cache_gib}; it must be more than 0.")


@dataclass(eq=False, kw_only=True)
class SelfSamples:
    """A pair source: the reference reply is chosen, and a plain sample of the policy rejected: a control.

    Args:
        temperature: 0 is greedy decoding.
        max_new_tokens: Longest sample.
        max_cache_gib: Most keys and values at once, in GiB.
        seed: Of the samples.

    Attributes:
        dropped: Why rows gave no pair, counted since the source was made.
    """

    name: ClassVar[str] = "self-samples"
    needs_policy: ClassVar[bool] = True
    samples_elsewhere: ClassVar[bool] = True
    not_about_answers: ClassVar[frozenset[str]] = frozenset({"max_cache_gib"})

    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples; 0 is greedy decoding."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest sample, in tokens."})
    max_cache_gib: float = field(default=MAX_CACHE_GIB, metadata={"help": CACHE_HELP})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    dropped: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses options out of range."""
        check_sampling(self.temperature, self.max_new_tokens)
        check_cache(self.max_cache_gib)

    def __call__(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | None]:
        """A preference row per row; None where the sample is empty or says the same as the reference."""
        references = [reference_reply(row, name_of(row, index)) for index, row in enumerate(rows)]
        samples = sampled_replies(
            rows,
            policy,
            replies=1,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            round=round,
            max_cache_gib=self.max_cache_gib,
        )
        return [
            self._pair(row, reference, sample)
            for row, reference, (sample,) in zip(rows, references, samples, strict=True)
        ]

    def _pair(self, row: Row, reference: str, sample: Reply) -> Row | None:
        if not sample.text or sample.text == reference.strip():
            self.dropped[SAME_AS_REFERENCE if sample.text else EMPTY_SAMPLE] += 1
            return None
        return preference_row(row, reference, sample.text, source=self.name, unfinished=not sample.is_finished)
