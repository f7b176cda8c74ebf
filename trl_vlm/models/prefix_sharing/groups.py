"""Which sequences of a batch have a prompt in common, and a batch that holds the images of each prompt once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trl_vlm.models.families import is_image_input
from trl_vlm.models.prefix_sharing.sharing import SHARED_PREFIX


def rows_by_prompt(ids: Tensor, mask: Tensor, images: Mapping[str, Sequence[Tensor]]) -> list[int]:
    """For each sequence the number of its row, counted from 0 in the order in which the rows come first.

    Sequences are of one row if their prompts hold the same tokens in the same columns, and their images the same
    values: so it does not matter who shuffled them.

    Args:
        ids: (N, P), the tokens of the prompts.
        mask: (N, P), 1 on tokens and 0 on padding.
        images: What belongs to the images of a sequence, by name; N tensors under each.
    """
    prompts = [row.tobytes() for row in torch.cat([ids * mask, mask], dim=1).cpu().numpy()]
    rows: list[int] = []
    known: dict[bytes, list[tuple[int, int]]] = {}  # row, and its first sequence
    firsts = 0
    for place, prompt in enumerate(prompts):
        alike = known.setdefault(prompt, [])
        row = next((row for row, first in alike if _same_images(images, first, place)), None)
        if row is None:
            row, firsts = firsts, firsts + 1
            alike.append((row, place))
        rows.append(row)
    return rows


def _same_images(images: Mapping[str, Sequence[Tensor]], one: int, other: int) -> bool:
    return all(torch.equal(values[one], values[other]) for values in images.values())


def common_prefixes(ids: Tensor, mask: Tensor, firsts: Sequence[int]) -> Tensor:
    """What sequences that begin alike share, (N, 2): row and length of the prefix, as `SHARED_PREFIX` holds them.

    Args:
        ids: (N, T), right padded.
        mask: (N, T), 1 on tokens.
        firsts: For each sequence the place of the first one that begins alike.
    """
    first = torch.tensor(firsts, device=ids.device)
    differs = (ids != ids[first]) | (mask * mask[first] == 0)
    # Also equal sequences keep their last token apart: it is what a head reads.
    last = mask.sum(1) - 1
    common = torch.where(differs.any(1), differs.int().argmax(1), last).minimum(last)
    places = sorted(set(firsts))
    row = torch.tensor([places.index(place) for place in firsts], device=ids.device)
    prefix = torch.stack([common[row == number].min() for number in range(len(places))])
    return torch.stack([row, prefix[row]], dim=1)


def share_rows(batch: Mapping[str, Tensor], shared_prefix: Tensor, once: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of N sequences with the images of those that share a row once; the batch is not modified.

    Args:
        batch: The inputs of a model, with the images of each sequence.
        shared_prefix: (N, 2); all images are in what is shared.
        once: The image inputs of one sequence of each row, in the order of the rows; the rest of it is not read.
    """
    pixels = {name: value for name, value in once.items() if is_image_input(name)}
    return {name: pixels.get(name, value) for name, value in batch.items()} | {SHARED_PREFIX: shared_prefix}
