"""Options of `RLOOTrainer` that TRL does not have."""

from dataclasses import dataclass

import trl

from trl_vlm.trainers.options import GroupOptions


@dataclass
class RLOOConfig(GroupOptions, trl.RLOOConfig):
    """TRL's `RLOOConfig`, with options for the parts of a vision-language model that train."""
