"""Judges of which of two replies is better: a model, an endpoint, a reward function or a script."""

from trl_vlm.judges.chat import Answer, Chat, LocalChat, Request
from trl_vlm.judges.claims import ChatClaimChecker, ClaimJudge, LocalClaimChecker, RewrittenClaims
from trl_vlm.judges.endpoint import EndpointChat, SpendingCapReached
from trl_vlm.judges.judge import Comparison, Judge, ScriptedJudge, Verdict
from trl_vlm.judges.options import JUDGES, ChatOptions, JudgeOptions, judge_of
from trl_vlm.judges.pairwise import EndpointJudge, LocalJudge, PairwiseJudge
from trl_vlm.judges.reward import RewardJudge
from trl_vlm.judges.spending import Spending, spending_of

__all__ = [
    "JUDGES",
    "Answer",
    "Chat",
    "ChatClaimChecker",
    "ChatOptions",
    "ClaimJudge",
    "Comparison",
    "EndpointChat",
    "EndpointJudge",
    "Judge",
    "JudgeOptions",
    "LocalChat",
    "LocalClaimChecker",
    "LocalJudge",
    "PairwiseJudge",
    "Request",
    "RewrittenClaims",
    "RewardJudge",
    "ScriptedJudge",
    "Spending",
    "SpendingCapReached",
    "Verdict",
    "judge_of",
    "spending_of",
]
