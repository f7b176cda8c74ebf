"""Options of `RLOOTrainer` that TRL does not have."""

from dataclasses import dataclass

import trl

from trl_vlm.trainers.sampled_parts import RolloutOptions


@dataclass
class RLOOConfig(RolloutOptions, trl.RLOOConfig):
    """TRL's `RLOOConfig`, with options for the parts of a vision-language model that train."""
