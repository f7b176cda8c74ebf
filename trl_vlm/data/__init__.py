"""Rows and what becomes of them: the row contract, images, facts, collators, converters."""

from trl_vlm.data.encoding import RewardCollator, encode
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.data.images import load_image

__all__ = ["JudgeTemplate", "RewardCollator", "encode", "load_image"]
