"""Where tokens go when prompts are shared, and when that is less work."""

import pytest
import torch
from transformers import LlamaConfig

from trl_vlm.models.prefix_sharing.packing import Segment, calls_of, gain, packing, pays

CONFIG = LlamaConfig(hidden_size=384)


def mask_of(lengths, starts=None, width=None):
    """(N, T), with tokens from `starts` on."""
    ends = torch.tensor(lengths) + torch.tensor(starts or [0] * len(lengths))
    columns = torch.arange(width or int(ends.max()))
    return ((columns < ends[:, None]) & (columns >= ends[:, None] - torch.tensor(lengths)[:, None])).long()


def pairs(*rows):
    """Attention mask and shared prefix of rows given as (prompt, chosen, rejected, ...) in tokens."""
    replies = len(rows[0]) - 1
    lengths = [row[0] + row[1 + reply] for reply in range(replies) for row in rows]
    prefix = [[number, row[0]] for _ in range(replies) for number, row in enumerate(rows)]
    return mask_of(lengths), torch.tensor(prefix)


def test_two_rows_by_hand():
    # Row 0: prompt of 3, replies of 2 and 1. Row 1: prompt of 2, replies of 1 and 3.
    slots = packing(*pairs((3, 2, 1), (2, 1, 3)))
    assert slots.row.tolist() == [0] * 6 + [1] * 6
    assert slots.column.tolist() == slots.index.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3, 4]
    assert slots.source.tolist() == [0, 1, 2, 3, 4, 13, 5, 6, 7, 17, 18, 19]
    assert slots.target.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 0, 0], [0, 1, 2, 5, 0], [6, 7, 9, 10, 11]]
    # Sequence, first key, first query, end.
    assert slots.segments == [(0, 0, 0, 3), (0, 0, 3, 5), (2, 0, 3, 4), (1, 0, 0, 2), (1, 0, 2, 3), (3, 0, 2, 5)]


def test_sequences_in_any_order_and_with_padding_before_them():
    # One prompt of 2 tokens for the sequences 1 and 2, one of 1 token for sequence 0.
    slots = packing(mask_of([2, 3, 4], starts=[2, 1, 1], width=6), torch.tensor([[1, 1], [0, 2], [0, 2]]))
    assert slots.source.tolist() == [7, 8, 9, 15, 16, 2, 3]
    assert slots.column.tolist() == [1, 2, 3, 3, 4, 2, 3]
    assert slots.index.tolist() == [0, 1, 2, 2, 3, 0, 1]
    assert slots.target.tolist() == [[0, 0, 5, 6, 0, 0], [0, 0, 1, 2, 0, 0], [0, 0, 1, 3, 4, 0]]


def test_a_reply_without_tokens_and_a_prompt_without_tokens_have_no_segment():
    slots = packing(mask_of([3, 5, 2, 2]), torch.tensor([[0, 3], [0, 3], [1, 0], [1, 0]]))
    assert slots.segments == [(0, 0, 0, 3), (1, 0, 3, 5), (2, 0, 0, 2), (3, 0, 0, 2)]


def test_a_call_holds_segments_of_its_own_size():
    short, long = Segment(0, 0, 600, 616), Segment(1, 0, 30, 540)
    assert calls_of([short, long, short, long]) == [[long, long], [short, short]]
    prompt = Segment(0, 0, 0, 600)
    assert calls_of([prompt, short, prompt, short]) == [[prompt, prompt], [short, short]]


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        ([(606, 64, 64)] * 2, 1.8),
        ([(606, 64, 64, 64, 64)], 2.8),
        ([(606, 512, 512)], 1.2),
        # One long prompt with short replies beside one short prompt with long replies.
        ([(606, 16, 16), (30, 508, 508)], 1.3),
        ([(30, 128, 128)], 1.07),
        ([(30, 512, 512)], 0.9),
    ],
)
def test_the_count_of_work(rows, tokens):
    mask, shared_prefix = pairs(*rows)
    slots = packing(mask, shared_prefix)
    assert gain(CONFIG, mask, slots) >= tokens
    assert mask.numel() / len(slots.source) == pytest.approx(gain(CONFIG, mask, slots), rel=0.35)


def test_prompts_that_are_short_beside_their_replies_are_not_shared():
    for row, text, images in [
        ((30, 64, 64), True, True),
        ((30, 160, 160), False, True),
        ((30, 512, 512), False, False),
        ((600, 64, 64), True, True),
    ]:
        mask, shared_prefix = pairs(row)
        slots = packing(mask, shared_prefix)
        assert pays(CONFIG, mask, slots, has_images=False) == text, row
        assert pays(CONFIG, mask, slots, has_images=True) == images, row
