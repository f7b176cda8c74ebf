"""Options of `GRPOTrainer` that TRL does not have."""

from dataclasses import dataclass

import trl

from trl_vlm.trainers.options import GroupOptions


@dataclass
class GRPOConfig(GroupOptions, trl.GRPOConfig):
    """TRL's `GRPOConfig`, with options for the parts of a vision-language model that train."""
