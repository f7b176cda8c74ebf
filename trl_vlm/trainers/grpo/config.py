"""Options of `GRPOTrainer` that TRL does not have."""

from dataclasses import dataclass

import trl

from trl_vlm.trainers.sampled_parts import RolloutOptions


@dataclass
class GRPOConfig(RolloutOptions, trl.GRPOConfig):
    """TRL's `GRPOConfig`, with options for the parts of a vision-language model that train."""
