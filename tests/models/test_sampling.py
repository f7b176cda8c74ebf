"""Samples that are drawn as the largest of logits and noise."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_vlm.models.sampling import GumbelSampler, gumbel_noise


def test_samples_follow_the_softmax_of_the_logits_over_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    for temperature in (1.0, 0.5):
        sampler = GumbelSampler(range(4000), temperature)
        tokens = sampler(None, logits.expand(4000, 4)).argmax(-1)
        shares = torch.bincount(tokens, minlength=4) / 4000
        expected = (logits / temperature).softmax(-1)
        assert ((shares - expected).abs() <= 3.5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_sequence_gets_the_same_tokens_whatever_is_sampled_beside_it():
    logits = torch.randn(5, 3, 50, generator=torch.Generator().manual_seed(0))  # steps, sequences, tokens
    together, alone = GumbelSampler([7, 8, 9]), GumbelSampler([8])
    leaving = GumbelSampler([7, 8, 9])
    for step in range(5):
        all_three = together(None, logits[step])
        torch.testing.assert_close(alone(None, logits[step, 1:2]), all_three[1:2])
        stay = [0, 1, 2] if step < 2 else [1, 2]  # the first has ended
        torch.testing.assert_close(leaving(None, logits[step, stay], stay), all_three[stay])


def test_temperature_zero_is_greedy():
    logits = torch.randn(2, 9)
    assert GumbelSampler([0, 1], temperature=0)(None, logits) is logits
    with pytest.raises(ValueError, match="must be 0"):
        GumbelSampler([0], temperature=-1)
    with pytest.raises(ValueError, match="3 sequences came with 2 seeds"):
        GumbelSampler([0, 1])(None, torch.zeros(3, 4))


def test_a_sequence_without_a_seed_is_greedy_beside_one_that_is_sampled():
    logits = torch.randn(40, 2, 9, generator=torch.Generator().manual_seed(0))
    sampler, alone = GumbelSampler([None, 5]), GumbelSampler([5])
    tokens = [sampler(None, step).argmax(-1) for step in logits]
    assert [int(pair[0]) for pair in tokens] == [int(step[0].argmax()) for step in logits]
    assert [int(pair[1]) for pair in tokens] == [int(alone(None, step[1:]).argmax()) for step in logits]
    assert [int(pair[1]) for pair in tokens] != [int(step[1].argmax()) for step in logits]


def splitmix64(seed, count):
    """The first numbers of the generator, as its paper has it."""
    numbers, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        numbers.append(mixed ^ (mixed >> 31))
    return numbers


def test_the_noise_is_that_of_splitmix64_one_number_per_token_of_the_vocabulary():
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # of the public reference code
    seeds, vocabulary, steps = [7, 2**63 - 1], 5, 3
    sampler = GumbelSampler(seeds)
    found = torch.stack([sampler(None, torch.zeros(2, vocabulary)) for _ in range(steps)], 1)  # (2, steps, V)
    for row, seed in zip(found, seeds, strict=True):
        wanted = [-math.log(-math.log1p(-((k >> 11) + 0.5) / 2**53)) for k in splitmix64(seed, steps * vocabulary)]
        torch.testing.assert_close(row.flatten(), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_noise_is_standard_gumbel_and_never_infinite():
    noise = gumbel_noise(range(0, 400_000, 100), 250, torch.device("cpu"))
    assert noise.isfinite().all() and noise.unique().numel() > 0.95 * noise.numel()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    assert torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1].abs() < 0.01


class Operators(TorchDispatchMode):
    """Counts what would be launched on a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen[str(operator)] += 1
        return operator(*args, **kwargs or {})


def test_many_sequences_are_drawn_with_as_many_operators_as_two():
    counts = []
    for sequences in (2, 100):
        sampler, logits = GumbelSampler(range(sequences)), torch.zeros(sequences, 33)
        sampler(None, logits)  # what is computed once per vocabulary
        with Operators() as operators:
            sampler(None, logits)
        counts.append(operators.seen)
    assert counts[0] == counts[1] and counts[0].total() < 40
