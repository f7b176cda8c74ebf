"""How many tokens a micro-batch has, and how many of them go through the model where replies share their prompt."""

from math import gcd
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from trl import DPOConfig, GRPOConfig, RewardConfig, RLOOConfig

from trl_vlm.models.prefix_sharing.packing import packing, pays
from trl_vlm.models.prefix_sharing.sharing import why_not_shareable, why_pairs_not_shareable
from trl_vlm.trainers.group_sharing import depends_on_micro_batches

SAMPLE_ROWS = 8


class Tokens(NamedTuple):
    """The sequences of a micro-batch.

    Args:
        sequences: How many there are.
        longest: Tokens of each, as of the longest one.
        prompt: Tokens at the beginning of each, images included, that it shares with others; 0: none, or unknown.
        prompts: How many different ones there are, where they are shared.
    """

    sequences: int
    longest: int
    prompt: int = 0
    prompts: int = 0

    @property
    def computed(self) -> int:
        """Tokens that go through the language model."""
        return self.prompts * self.prompt + self.read

    @property
    def read(self) -> int:
        """Tokens that a language head reads."""
        return self.sequences * (self.longest - self.prompt)

    @property
    def copied(self) -> int:
        """Tokens of shared prompts whose keys and values are laid beside those of each reply."""
        return self.sequences * self.prompt

    @property
    def images(self) -> int:
        """How often the vision tower sees an image."""
        return self.prompts if self.prompt else self.sequences

    def __str__(self) -> str:
        return (
            f"{self.sequences} sequences of at most about {self.longest:,} tokens on a device at once (the longest of "
            f"the first {SAMPLE_ROWS} rows)"
        )


def micro_batch(training: Any, longest: int, replies: int = 2) -> Tokens:
    """The sequences of a micro-batch on one device, if nothing is shared.

    Args:
        training: The trainer's configuration.
        longest: Tokens of the longest sequence.
        replies: To a row of preferences: chosen, rejected, and further rejected ones.
    """
    rows = training.per_device_train_batch_size
    return Tokens(rows * (replies if isinstance(training, DPOConfig | RewardConfig) else 1), longest)


def shared_micro_batch(training: Any, config: PreTrainedConfig, prompt: int, reply: int, replies: int = 2) -> Tokens:
    """The sequences of a micro-batch on one device, with what the trainer shares.

    Args:
        training: The trainer's configuration.
        config: The model's.
        prompt: Tokens of a prompt, images included.
        reply: Tokens of a reply, and of what follows it.
        replies: As for `micro_batch`.
    """
    whole = micro_batch(training, prompt + reply, replies)
    prompts = _prompts(training, whole.sequences)
    if prompts == whole.sequences or _why_not(training, config) is not None:
        return whole
    mask = torch.ones(whole.sequences, whole.longest, dtype=torch.long)
    rows = torch.arange(whole.sequences) * prompts // whole.sequences
    slots = packing(mask, torch.stack([rows, torch.full_like(rows, prompt)], 1))
    shares = pays(config.get_text_config(), mask, slots, has_images=True)
    return whole._replace(prompt=prompt, prompts=prompts) if shares else whole


def _prompts(training: Any, sequences: int) -> int:
    """Different prompts of a micro-batch, at most."""
    if isinstance(training, DPOConfig | RewardConfig):
        return training.per_device_train_batch_size
    if not isinstance(training, GRPOConfig | RLOOConfig):
        return sequences
    group = training.num_generations or 1
    # Replies of a group lie beside each other; a group that a micro-batch cuts brings its prompt to both.
    return min(sequences, -(-(sequences + group - gcd(sequences, group)) // group))


def _why_not(training: Any, config: PreTrainedConfig) -> str | None:
    """Why each reply computes its prompt, as far as options and the model's configuration tell."""
    if not getattr(training, "share_prefix", False) or training.torch_compile:
        return "`share_prefix` is off, or `torch_compile` on"
    if depends_on_micro_batches(training):
        return "the loss keeps the shuffle that takes groups apart"
    return why_pairs_not_shareable(config) if isinstance(training, RewardConfig) else why_not_shareable(config)
