"""Replies of any vision-language model to rows with prompts and images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from trl_vlm.data.encoding import encode
from trl_vlm.data.rows import row_images


@torch.no_grad()
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
    """One reply per row: greedy, or sampled at temperature 1 if `seed` is given.

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
    was_training = model.training
    model.eval()
    choice = (
        {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    )
    replies: list[str] = []
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for start in tqdm(range(0, len(rows), batch_size), desc="replies", disable=not progress):
            chunk = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
            names = [f"row {start + index}" for index in range(len(chunk))]
            batch = encode(
                processor,
                [row["prompt"] for row in chunk],
                [row_images(row, name) for row, name in zip(chunk, names, strict=True)],
                add_generation_prompt=True,
                padding_side="left",
                names=names,
            )
            batch = {key: value.to(model.device) for key, value in batch.items()}
            output = model.generate(**batch, max_new_tokens=max_new_tokens, **choice)
            replies += processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return replies
