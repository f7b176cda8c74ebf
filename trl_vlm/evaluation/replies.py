"""Replies of any vision-language model to rows with prompts and images."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from trl_vlm.data.encoding import prompt_batches
from trl_vlm.models.generation import Policy, generated


def generate_replies(
    model: nn.Module,
    processor: ProcessorMixin,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    seed: int | None = None,
    progress: bool = True,
) -> list[str]:
    """One reply per row: greedy, or a plain sample at temperature 1 if `seed` is given.

    What a checkpoint sets for generation (a repetition penalty, top-k) is not applied; see `models.generation`.

    Args:
        model: A generative model; it is put into evaluation mode for the time.
        processor: Its processor.
        rows: Rows with `prompt` and, if they have any, `images`.
        batch_size: Rows per call of `generate`.
        max_new_tokens: Longest reply, in tokens.
        seed: Seed of the samples; torch's global generator is left as it was.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A row's image is broken or does not match its placeholders; the error names the row.
    """
    batches = prompt_batches(processor, rows, batch_size=batch_size)
    replies = generated(
        Policy(model, processor),
        tqdm(batches, desc="replies", total=-(-len(rows) // batch_size), disable=not progress),
        max_new_tokens=max_new_tokens,
        temperature=0.0 if seed is None else 1.0,
        seed=seed,
    )
    return [reply.text for reply in replies]
