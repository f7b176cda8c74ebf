"""The facts for the model card of `DPOTrainer`."""

from collections.abc import Mapping
from typing import Protocol

from trl_vlm.pairs.registry import COMPOSED_SOURCES, SOURCES
from trl_vlm.pairs.source import PairSource
from trl_vlm.trainers.card import ALIGNMENT_PAPER, DENSE_PAPER, DPO_PAPER, IMAGE_PAPERS, POVID_PAPER, CardFacts
from trl_vlm.trainers.dpo.config import DPOConfig


class DPORun(Protocol):
    """The attributes of a trainer that the card reads."""

    args: DPOConfig


def card_facts(trainer: DPORun, pair_source: PairSource | None) -> CardFacts:
    """Method, papers and way of loading."""
    args = trainer.args
    losses = ", ".join(args.loss_type) if isinstance(args.loss_type, list) else args.loss_type
    method, papers = [f"Direct preference optimization, loss `{losses}`, beta {args.beta}."], [DPO_PAPER]
    if args.dense_gamma is not None:
        method.append(
            f"Dense DPO: corrected segments weigh {args.dense_gamma} times as much as other tokens, and the score of "
            f"a reply is the weighted {args.dense_reduction} of its log-probabilities."
        )
        papers.append(DENSE_PAPER)
    if args.image_weight:
        images = (
            "`rejected_images`" if args.image_corruption is None else f"corrupted images (`{args.image_corruption}`)"
        )
        method.append(
            f"Image side of preference, weight {args.image_weight}: chosen replies were made likelier under their own "
            f"images than under {images}."
        )
        papers.append(IMAGE_PAPERS[args.image_preset or "mdpo"])
    if args.anchor_weight:
        method.append(f"An anchor of weight {args.anchor_weight} kept chosen replies as likely as the reference.")
    if args.povid_loss is not None:
        method.append(f"A further rejected reply is read off noisy images (`{args.povid_loss}`).")
        papers.append(POVID_PAPER)
    if pair_source is not None:
        method += _about(pair_source)
        papers += _papers(pair_source)
    return CardFacts(method, papers=[paper for place, paper in enumerate(papers) if paper not in papers[:place]])


def _parts_of(source: PairSource) -> list[PairSource]:
    """The source, and those that it is made of."""
    names = {entry.name for entry in (*SOURCES.values(), *COMPOSED_SOURCES.values())}
    inner = [value for value in getattr(source, "__dict__", {}).values() if type(value).__name__ in names]
    return [source, *(part for one in inner for part in _parts_of(one))]


def _about(source: PairSource) -> list[str]:
    """How the pairs were made, and who judged them."""
    parts = _parts_of(source)
    text = [f"The pairs were made during training by {', '.join(f'`{type(part).__name__}`' for part in parts)}."]
    for judge in (getattr(part, "judge", None) for part in parts):
        if judge is not None:
            name = getattr(getattr(judge, "chat", None), "model", None)  # of an endpoint; else the model itself
            asked = f" (`{name}`)" if isinstance(name, str) else ""
            text.append(f"A `{type(judge).__name__}`{asked} chose between replies.")
    return text


def _papers(source: PairSource) -> list[Mapping[str, str]]:
    known = {paper["id"]: paper for paper in (ALIGNMENT_PAPER, POVID_PAPER)}
    numbers = {entry.name: entry.paper for entry in SOURCES.values()}
    return [known[number] for part in _parts_of(source) if (number := numbers.get(type(part).__name__, ""))]
