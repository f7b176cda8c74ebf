"""Sources of preference pairs: what makes a rejected reply, or both replies, of a row."""

from trl_vlm.models.generation import Policy, generating
from trl_vlm.pairs.bdhs.bdhs import BDHS
from trl_vlm.pairs.bdhs.similarity import SentenceEncoder
from trl_vlm.pairs.corruption import Corrupted
from trl_vlm.pairs.judged import Judged
from trl_vlm.pairs.mixed import BothRejected, Mixed, Offline
from trl_vlm.pairs.noise import NoiseLevel, distorted, noise_level
from trl_vlm.pairs.povid import POVID
from trl_vlm.pairs.samples import SelfSamples
from trl_vlm.pairs.source import PairSource

__all__ = [
    "BDHS",
    "BothRejected",
    "Corrupted",
    "Judged",
    "Mixed",
    "NoiseLevel",
    "Offline",
    "POVID",
    "PairSource",
    "Policy",
    "SelfSamples",
    "SentenceEncoder",
    "distorted",
    "generating",
    "noise_level",
]
