"""The arms of `harder_world.py`: what each trains on, the cells that are tried, and what is compared with what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BLINDNESS = (0.0, 0.6, 1.5)  # extra pixel noise of the reward models
RECALL_MARGIN = 0.01  # what a cell may lose of the supervised model's recall on the development split


class Cell(NamedTuple):
    """One setting of an arm: a learning rate, and the weight of the anchor (of PPO: of the KL penalty)."""

    rate: float
    weight: float


SFT_CELLS = tuple(Cell(rate, 0.0) for rate in (3e-4, 1e-3, 2e-3, 6e-4, 1e-4, 2e-4))
CELLS = tuple(Cell(rate, anchor) for anchor in (1.0, 0.3, 0.0) for rate in (3e-4, 1e-3))
PPO_CELLS = tuple(Cell(rate, kl) for kl in (0.4, 0.2, 0.8) for rate in (3e-4, 1e-4))


@dataclass(frozen=True)
class Arm:
    """A training: which rows it reads, TRL's loss, and what else is set.

    Args:
        title: In the report.
        rows: A method of `Seed` for its rows, or the noise before the eyes of the reward model of PPO.
        config: Further fields of `DPOConfig`.
        loss: TRL's loss; "sft" has no anchor.
        cells: The settings that are tried, in this order.
        online: Share of the pairs that the policy makes while it trains, ranked by a judge who knows the truth; the
            others are the rows' own.
    """

    title: str
    rows: str | float
    config: Mapping[str, Any] = field(default_factory=dict)
    loss: str = "sigmoid"
    cells: tuple[Cell, ...] = CELLS
    online: float = 0.0


PAIR = {"beta": 0.1}
IMAGE = PAIR | {"image_weight": 1.0}
ARMS = {
    "sft": Arm("supervised on the chosen replies", "corrections", PAIR, "sft", SFT_CELLS),
    "dpo": Arm("DPO", "corrections", PAIR),
    "averaged": Arm("averaged DPO", "corrections", {"beta": 0.5, "dense_gamma": 1.0, "dense_reduction": "mean"}),
    "dense_diff": Arm("Dense DPO by diff", "corrections", {"dense_preset": "paper"}),
    "dense_spans": Arm("Dense DPO by spans", "marked_corrections", {"dense_preset": "paper"}),
    "image_mask": Arm("DPO, image pair by mask", "corrections", IMAGE | {"image_corruption": "mask"}),
    "image_noise": Arm("DPO, image pair by noise", "corrections", IMAGE | {"image_corruption": "noise"}),
    "image_other": Arm("DPO, image pair by another image", "corrections", IMAGE | {"image_corruption": "other"}),
    "exact_sft": Arm("supervised on exact captions", "self_samples", PAIR, "sft", SFT_CELLS),
    "self": Arm("own samples rejected", "self_samples", PAIR),
    "noise": Arm("BDHS by noise", "noise_pairs", PAIR),
    "unguided": Arm("masks without guidance", "unguided_pairs", PAIR),
    "bdhs": Arm("BDHS by masks", "masked_pairs", PAIR),
    "rankings": Arm("DPO on 2,400 rankings", "rankings", PAIR),
    "few": Arm("DPO on 200 of the corrections", "few_corrections", PAIR),
    "offline": Arm("DPO, pairs judged before training", "judged_pairs", PAIR),
    "mixed": Arm("DPO, half of the pairs online", "judged_pairs", PAIR, online=0.5),
    "online": Arm("DPO, all pairs online", "prompts", PAIR, online=1.0),
}
for _noise in BLINDNESS:
    for _facts in ("facts", "no_facts"):
        _title = f"PPO, {_facts.replace('_', ' ')}, reward model's noise {_noise:g}"
        ARMS[f"{_facts}@{_noise:g}"] = Arm(_title, _noise, {"use_facts": _facts == "facts"}, "ppo", PPO_CELLS)
START = "supervised"  # the model that every arm starts from
TITLES = {START: "supervised model", "chosen": "the corrected replies themselves"}
TITLES |= {name: arm.title for name, arm in ARMS.items()}
# Question -> the arm that others are compared with, and these.
COMPARISONS = {
    "What each training changes": (START, tuple(ARMS)),
    "Preference against supervised training on the same chosen replies": ("sft", ("dpo", "dense_spans")),
    "What Dense DPO weighs": ("dpo", ("averaged", "dense_diff", "dense_spans")),
    "The image side": ("dpo", ("image_mask", "image_noise", "image_other")),
    "Where rejected replies come from": ("self", ("exact_sft", "noise", "unguided", "bdhs")),
    "Guided masks against masks alone and noise": ("bdhs", ("unguided", "noise")),
    "Corrections against rankings": ("rankings", ("dpo", "few")),
    "When replies are drawn and judged": ("offline", ("mixed", "online")),
} | {f"Facts, where the reward model's noise is {n:g}": (f"no_facts@{n:g}", (f"facts@{n:g}",)) for n in BLINDNESS}


def chosen(scores: Mapping[Cell, tuple[float, float]], recall: float) -> Cell:
    """The cell that says the least untrue things at matched recall; if none keeps recall, the one that keeps most.

    Args:
        scores: Cell to its share of untrue sentences and its recall on the development split.
        recall: The supervised model's.
    """
    kept = {cell: untrue for cell, (untrue, found) in scores.items() if found >= recall - RECALL_MARGIN}
    return min(kept, key=lambda cell: kept[cell]) if kept else max(scores, key=lambda cell: scores[cell][1])
