"""Plain sampling of which each reply has its own random numbers."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# SplitMix64: the n-th number of a stream is `_mixed(seed + n * GOLDEN)`, so any of them is there without those before.
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_DIGITS = 53  # of the 64 bits, those that a number is made of


class GumbelSampler:
    """Sampling as an argmax: tokens of the largest logit / temperature + Gumbel noise are samples of the softmax.

    The noise of a sequence is a function of its seed, of how many tokens it has got, and of the token: its tokens do
    not depend on which others are sampled beside it, and a CPU and a GPU draw the same. The noise of all sequences is
    computed at once. `Continuations` takes a sampler directly. `generate(do_sample=False)` takes it as a logits
    processor wrapped in a function of two arguments, since it passes a third one only for beams.

    Args:
        seeds: One per sequence, for example `[draws.seed_of("tokens", iteration, number) ...]`; a sequence whose seed
            is None is decoded greedily.
        temperature: 0 is greedy decoding.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, for the random numbers.
    """

    def __init__(self, seeds: Sequence[int | None], temperature: float = 1.0):
        if not temperature >= 0:
            raise ValueError(f"`temperature` is {temperature}; it must be 0 (greedy) or more.")
        self.seeds = list(seeds)
        self.temperature = temperature
        self._tokens_drawn = [0] * len(self.seeds)

    def __call__(self, input_ids: Tensor | None, scores: Tensor, sequences: Sequence[int] | None = None) -> Tensor:
        """Scores (N, V) whose argmax is the sampled token; the argument is not modified.

        Args:
            input_ids: Not read.
            scores: (N, V), logits of the next token.
            sequences: Which of the `seeds` the N rows belong to; all of them in order if None.
        """
        if self.temperature == 0:
            return scores
        sequences = range(len(self.seeds)) if sequences is None else sequences
        if len(sequences) != len(scores):
            raise ValueError(f"{len(scores)} sequences came with {len(sequences)} seeds; each needs its own.")
        greedy = [row for row, sequence in enumerate(sequences) if self.seeds[sequence] is None]
        noise = gumbel_noise(self._starts(sequences, scores.size(1)), scores.size(1), scores.device)
        if greedy:
            noise[greedy] = 0.0
        return scores.float() / self.temperature + noise

    def _starts(self, sequences: Sequence[int], vocabulary: int) -> list[int]:
        """Where in its stream of random numbers each sequence is; each has one for every token of the vocabulary."""
        starts = []
        for sequence in sequences:
            starts.append((self.seeds[sequence] or 0) + self._tokens_drawn[sequence] * vocabulary * _GOLDEN)
            self._tokens_drawn[sequence] += 1
        return starts


def gumbel_noise(starts: Sequence[int], count: int, device: torch.device) -> Tensor:
    """(N, count) float32, for each of N starts the next `count` numbers of its stream, as standard Gumbel variables.

    -log(-log(1 - v)) for v = (k + 1/2) / 2^53: the large values, those that decide, come of small v, which float32
    keeps exactly.
    """
    bits = torch.tensor([_signed(start) for start in starts], device=device)[:, None] + _counter(count, device)
    for shift, factor in zip(_SHIFTS, (*_FACTORS, None), strict=True):
        bits ^= _shifted(bits, shift)
        if factor is not None:
            bits *= _signed(factor)  # overflow wraps around, as it is meant to
    noise = _shifted(bits, 64 - _DIGITS).float()
    noise.add_(0.5).mul_(-(2.0**-_DIGITS)).clamp_(min=-(1 - 2.0**-24))  # -v, above -1 also where float32 rounds
    return noise.log1p_().neg_().log_().neg_()


@lru_cache(maxsize=4)
def _counter(count: int, device: torch.device) -> Tensor:
    """(count,), multiples of GOLDEN from the first one on."""
    return torch.arange(1, count + 1, device=device) * _signed(_GOLDEN)


def _shifted(bits: Tensor, shift: int) -> Tensor:
    """The bits of int64 shifted to the right, with zeros from the left, where `>>` repeats the sign."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(number: int) -> int:
    """The 64 bits of a number as int64."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number
