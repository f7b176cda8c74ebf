"""The pair sources by name; a name is also the method of `trl-vlm pairs` and the value of `pair_source`.

A new source is one file, and one line here.
"""

from importlib import import_module
from typing import NamedTuple


class SourceEntry(NamedTuple):
    """The module and class of a source, and what it does.

    Args:
        module: Below `trl_vlm.pairs`.
        name: Of the class, a dataclass.
        help: What it does, in one line.
        paper: Its arXiv number, if it is from one.
    """

    module: str
    name: str
    help: str
    paper: str = ""


_ALIGNMENT = "2407.02477"
SOURCES = {
    "bdhs": SourceEntry(
        "bdhs.bdhs", "BDHS", "complete each reference sentence with most image tokens masked", _ALIGNMENT
    ),
    "povid": SourceEntry(
        "povid", "POVID", "replace reference tokens by the model's greedy ones under a noised image", "2402.11411"
    ),
    "dropout-ntp": SourceEntry(
        "dropout", "DropoutNTP", "continue the first half of the reference without the image", "2411.10442"
    ),
    "retouched": SourceEntry(
        "retouch", "Retouched", "sample replies to images with other colors or hardly any resolution", "2405.19716"
    ),
    "judged": SourceEntry("judged", "Judged", "sample replies of the model and let a judge choose", _ALIGNMENT),
    "corrupted": SourceEntry("corruption", "Corrupted", "let a language model put hallucinations into the reference"),
    "balance": SourceEntry(
        "balance", "Balanced", "drop pairs until chosen and rejected replies are equally long on average", "2405.17220"
    ),
    "self-samples": SourceEntry("samples", "SelfSamples", "take samples of the model as rejected replies: a control"),
}

# Sources without a command: the pairs of a dataset, and sources made of other sources.
COMPOSED_SOURCES = {
    "dataset": SourceEntry("mixed", "DatasetPairs", "take the row's own pair"),
    "mixed": SourceEntry("mixed", "MixedPairs", "take each row's pair from one of two sources by chance"),
    "combined": SourceEntry("mixed", "CombinedRejected", "put the rejected replies of two sources beside each other"),
}


def source_class(name: str) -> type:
    """The class of a source; imports its module.

    Raises:
        ValueError: There is no such source.
    """
    entry = {**SOURCES, **COMPOSED_SOURCES}.get(name)
    if entry is None:
        raise ValueError(f"There is no pair source {name!r}. Known are {', '.join([*SOURCES, *COMPOSED_SOURCES])}.")
    return getattr(import_module(f"trl_vlm.pairs.{entry.module}"), entry.name)
