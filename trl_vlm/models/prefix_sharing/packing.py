"""Where the tokens of plain sequences lie when those of a row share their prompt, and whether that is less work."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# Prompts without images are shared where the count of work says that this is faster by this factor: what the count
# leaves out (copies of keys, more and smaller calls) may take as much.
_MARGIN_OF_TEXT = 1.1
# How much of a padded call must be real.
_SMALLEST_SHARE = 0.5


class Segment(NamedTuple):
    """Queries that attend to the same keys: columns `first` to `end` of a plain sequence, to those from `start` on.

    The keys of a reply are its prompt and itself; those of a prompt are the prompt.
    """

    sequence: int
    start: int
    first: int
    end: int

    @property
    def queries(self) -> int:
        """How many columns attend."""
        return self.end - self.first

    @property
    def keys(self) -> int:
        """How many columns are attended to."""
        return self.end - self.start

    @property
    def is_prompt(self) -> bool:
        """Whether no earlier column is attended to than those that attend."""
        return self.first == self.start


class Packing(NamedTuple):
    """Where the tokens of N plain sequences of width T lie in one packed sequence of L tokens, without padding.

    Row after row: its prompt, and then its replies. All of it is on the CPU.

    source: (L,), index into the N * T plain tokens.
    index: (L,), how many tokens are before it in its plain sequence.
    column: (L,), the same, counted with the padding on the left of the row's first sequence.
    row: (L,), the row that it belongs to.
    target: (N, T), index into the L packed tokens; 0 for padding.
    segments: Prompts and replies, in the order in which they lie.
    """

    source: Tensor
    index: Tensor
    column: Tensor
    row: Tensor
    target: Tensor
    segments: list[Segment]


def packing(attention_mask: Tensor, shared_prefix: Tensor) -> Packing:
    """Where each token of plain sequences goes when the sequences of a row share their prompt.

    Args:
        attention_mask: (N, T), padded on either side, or on both.
        shared_prefix: (N, 2), the row of each sequence, counted from 0 without gaps, and the length of its prompt,
            the same for all sequences of a row.
    """
    width = attention_mask.size(1)
    attention_mask, shared_prefix = attention_mask.cpu(), shared_prefix.cpu()
    row, prompt = shared_prefix.unbind(1)
    start = attention_mask.int().argmax(1)
    reply, end = start + prompt, start + attention_mask.sum(1)
    column = torch.arange(width)
    is_token = (column >= start[:, None]) & (column < end[:, None])
    is_prompt = is_token & (column < reply[:, None])
    order = row.argsort(stable=True)
    is_first = torch.ones(len(row), dtype=torch.bool)  # the first sequence of a row brings its prompt
    is_first[order[1:]] = row[order].diff() > 0
    is_kept = is_token & (~is_prompt | is_first[:, None])
    places = order[:, None] * width + column
    source = places[is_kept[order]]
    target = torch.zeros(len(row) * width, dtype=torch.long)
    target[source] = torch.arange(len(source))
    target = target.view(-1, width)
    firsts = order[is_first[order]]  # of each row
    prompts_start = target.gather(1, start.clamp(max=width - 1)[:, None])[firsts][row]
    target = torch.where(is_prompt, prompts_start + column - start[:, None], target)
    segments = []
    for sequence in order.tolist():
        bounds = int(start[sequence]), int(reply[sequence]), int(end[sequence])
        if is_first[sequence]:
            segments.append(Segment(sequence, bounds[0], bounds[0], bounds[1]))
        segments.append(Segment(sequence, *bounds))
    segments = [segment for segment in segments if segment.queries > 0]
    sequence = source // width
    index = source % width - start[sequence]
    return Packing(source, index, index + start[firsts][row[sequence]], row[sequence], target, segments)


def calls_of(segments: Sequence[Segment]) -> list[list[Segment]]:
    """The segments in groups that are padded to one size: prompts, then replies, each with those of its own size."""
    calls: list[list[Segment]] = []
    for is_prompt in (True, False):
        alike = [segment for segment in segments if segment.is_prompt == is_prompt]
        open_call: list[Segment] = []
        for segment in sorted(alike, key=lambda one: one.queries * one.keys, reverse=True):
            if open_call and segment.queries * segment.keys < _SMALLEST_SHARE * _padded([*open_call, segment]):
                calls.append(open_call)
                open_call = []
            open_call.append(segment)
        calls += [open_call] if open_call else []
    return calls


def _padded(call: Sequence[Segment]) -> int:
    """How many pairs of query and key a segment of a call has, with padding."""
    return max(segment.queries for segment in call) * max(segment.keys for segment in call)


def gain(config: PreTrainedConfig, attention_mask: Tensor, slots: Packing) -> float:
    """How many times as much work a batch is without sharing: multiplications of the language model's layers.

    Args:
        config: Of the language model.
        attention_mask: (N, T), of the plain sequences.
        slots: How they would be packed.
    """
    # A layer multiplies with about 12 hidden_size^2 weights for a token, and 2 hidden_size times for a query and key.
    per_token = 6 * config.hidden_size
    sequences, width = attention_mask.shape
    tokens = len(slots.source)
    causal = 0.5  # a causal call without padding leaves out the other half
    is_padded = any(segment.keys < width for segment in slots.segments if not segment.is_prompt)
    plain = sequences * width * (per_token + width * (1 if is_padded else causal))
    packed = tokens * per_token
    for call in calls_of(slots.segments):
        packed += len(call) * _padded(call) * (causal if call[0].is_prompt else 1)
    return plain / packed


def pays(config: PreTrainedConfig, attention_mask: Tensor, slots: Packing, has_images: bool) -> bool:
    """Whether a batch is computed faster with shared prompts.

    Args:
        config: Of the language model.
        attention_mask: (N, T), of the plain sequences.
        slots: How they would be packed.
        has_images: Then the vision tower's work is shared too, which is not counted.
    """
    return gain(config, attention_mask, slots) >= (1.0 if has_images else _MARGIN_OF_TEXT)
