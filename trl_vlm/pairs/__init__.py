"""Pair sources, which make the rejected reply, or both replies, of a row. Names load on first use."""

import warnings
from typing import TYPE_CHECKING, Any

from trl_vlm.lazy import lazy_names

if TYPE_CHECKING:
    from trl_vlm.models.generation import Policy, generating
    from trl_vlm.pairs.balance import Balanced
    from trl_vlm.pairs.bdhs.bdhs import BDHS
    from trl_vlm.pairs.bdhs.similarity import SentenceEncoder
    from trl_vlm.pairs.corruption import Corrupted
    from trl_vlm.pairs.dropout import DropoutNTP
    from trl_vlm.pairs.judged import Judged
    from trl_vlm.pairs.mixed import CombinedRejected, DatasetPairs, MixedPairs
    from trl_vlm.pairs.noise import NoiseLevel, distorted, distorted_images, noise_level
    from trl_vlm.pairs.povid import POVID
    from trl_vlm.pairs.registry import COMPOSED_SOURCES, SOURCES, source_class
    from trl_vlm.pairs.retouch import Retouched
    from trl_vlm.pairs.samples import SelfSamples
    from trl_vlm.pairs.source import PairSource
    from trl_vlm.pairs.vllm import VLLMOptions

_MODULES = {
    "balance": ("Balanced",),
    "bdhs.bdhs": ("BDHS",),
    "bdhs.similarity": ("SentenceEncoder",),
    "corruption": ("Corrupted",),
    "dropout": ("DropoutNTP",),
    "judged": ("Judged",),
    "mixed": ("CombinedRejected", "DatasetPairs", "MixedPairs"),
    "noise": ("NoiseLevel", "distorted", "distorted_images", "noise_level"),
    "povid": ("POVID",),
    "registry": ("COMPOSED_SOURCES", "SOURCES", "source_class"),
    "retouch": ("Retouched",),
    "samples": ("SelfSamples",),
    "source": ("PairSource",),
    "vllm": ("VLLMOptions",),
}
_WHERE = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
_WHERE |= dict.fromkeys(("Policy", "generating"), "trl_vlm.models.generation")
_OLD_NAMES = {"BothRejected": "CombinedRejected", "Mixed": "MixedPairs", "Offline": "DatasetPairs"}

__all__ = [
    "BDHS",
    "COMPOSED_SOURCES",
    "POVID",
    "SOURCES",
    "Balanced",
    "CombinedRejected",
    "Corrupted",
    "DatasetPairs",
    "DropoutNTP",
    "Judged",
    "MixedPairs",
    "NoiseLevel",
    "PairSource",
    "Policy",
    "Retouched",
    "SelfSamples",
    "SentenceEncoder",
    "VLLMOptions",
    "distorted",
    "distorted_images",
    "generating",
    "noise_level",
    "source_class",
]

_load, __dir__ = lazy_names(__name__, _WHERE, __all__)


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        new = _OLD_NAMES[name]
        warnings.warn(f"`trl_vlm.pairs.{name}` is now called `{new}`.", DeprecationWarning, stacklevel=2)
        return _load(new)
    return _load(name)
