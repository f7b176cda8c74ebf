"""TRL reward functions: the image-and-facts reward model, symbolic terms, and their Fact-RLHF composition."""

from trl_vlm.data.answers import option_letter, yes_or_no
from trl_vlm.data.messages import reply_text
from trl_vlm.rewards.checks import checked
from trl_vlm.rewards.claims import (
    Claim,
    ClaimChecker,
    ClaimQuestion,
    ClaimReward,
    ClaimVerdict,
    ReplyClaims,
    sentence_claims,
)
from trl_vlm.rewards.ends import MissingEOSPenalty, cut_after_first, has_end, question_mark_ids
from trl_vlm.rewards.fact_rlhf import FactRLHFReward
from trl_vlm.rewards.length import LengthTerm
from trl_vlm.rewards.normalize import RewardStatistics, normalised, normalized
from trl_vlm.rewards.remote import RemoteReward
from trl_vlm.rewards.replies import RewardFunction
from trl_vlm.rewards.reward_model import RewardModelReward
from trl_vlm.rewards.symbolic import SymbolicCorrectness

__all__ = [
    "Claim",
    "ClaimChecker",
    "ClaimQuestion",
    "ClaimReward",
    "ClaimVerdict",
    "FactRLHFReward",
    "LengthTerm",
    "MissingEOSPenalty",
    "RemoteReward",
    "ReplyClaims",
    "RewardFunction",
    "RewardModelReward",
    "RewardStatistics",
    "SymbolicCorrectness",
    "checked",
    "cut_after_first",
    "has_end",
    "normalised",
    "normalized",
    "option_letter",
    "question_mark_ids",
    "reply_text",
    "sentence_claims",
    "yes_or_no",
]
