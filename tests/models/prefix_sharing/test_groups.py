"""Sequences of one prompt are found by what they hold, wherever they stand and however they are padded."""

import pytest
import torch
from torch.testing import assert_close

from tests.families import batch as made
from tests.families import build
from trl_vlm.models.prefix_sharing import sharing
from trl_vlm.models.prefix_sharing.groups import common_prefixes, rows_by_prompt, share_rows
from trl_vlm.models.prefix_sharing.sharing import FIRST_COLUMN, share_prefix


def test_prompts_are_told_apart_by_tokens_padding_and_pixels():
    ids = torch.tensor([[1, 2], [1, 2], [1, 3], [7, 2], [1, 2], [9, 2]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [0, 1], [1, 1], [0, 1]])
    pixels = [torch.full((1, 3), float(value)) for value in (0, 1, 0, 0, 0, 0)]
    assert rows_by_prompt(ids, mask, {}) == [0, 0, 1, 2, 0, 2]  # what stands under padding does not matter
    assert rows_by_prompt(ids, mask, {"pixel_values": pixels}) == [0, 1, 2, 3, 0, 3]
    pixels[4] = torch.zeros(2, 3)  # of two images
    assert rows_by_prompt(ids, mask, {"pixel_values": pixels}) == [0, 1, 2, 3, 4, 3]


def test_a_token_of_value_zero_is_no_padding():
    ids, mask = torch.tensor([[0, 5], [0, 5]]), torch.tensor([[1, 1], [0, 1]])
    assert rows_by_prompt(ids, mask, {}) == [0, 1]


def test_what_sequences_share_ends_before_the_first_difference_and_before_the_last_token():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 9, 0], [4, 4, 4, 0], [4, 4, 4, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    found = common_prefixes(ids, mask, [0, 0, 0, 3, 3])
    assert found.tolist() == [[0, 2], [0, 2], [0, 2], [1, 2], [1, 2]]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl", "paligemma"])
def test_replies_behind_left_padded_prompts_have_the_hidden_states_of_the_plain_path(family, monkeypatch):
    model, processor = build(family, sharp=6.0)
    prompts = made(processor, [1, 2], padding_side="left", size=(60, 60))
    once = {name: value for name, value in prompts.items() if value.shape != prompts["input_ids"].shape}
    order = [0, 1, 1, 0]  # the sequences of a row need not stand beside each other
    plain = {name: value[order] for name, value in prompts.items() if name not in once}
    replies = torch.randint(20, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(4, 6, dtype=torch.long)
    ends = torch.tensor([6, 3, 6, 0])  # one reply is empty
    plain["attention_mask"] = torch.cat([plain["attention_mask"], (torch.arange(6) < ends[:, None]).long()], 1)
    plain["input_ids"] = torch.cat([plain["input_ids"], replies], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in plain:
            plain[name] = torch.cat([plain[name], ones * (family == "paligemma")], 1)
    prompt = prompts["attention_mask"].sum(1)[order]
    by_sequence = images_of(once, order)
    with torch.no_grad():
        wanted = model.base_model(**plain, **by_sequence, use_cache=False).last_hidden_state
        share_prefix(model)
        shared_prefix = torch.stack([torch.tensor(order), prompt], dim=1)
        shared = share_rows(plain, shared_prefix, {}) | once
        monkeypatch.setattr(sharing, "pays", lambda *args: True)
        found = model.base_model(**shared, use_cache=False, **{FIRST_COLUMN: 1}).last_hidden_state
    is_token = plain["attention_mask"].bool()[:, 1:]
    assert_close(found[is_token], wanted[:, 1:][is_token], rtol=1e-4, atol=2e-5)


def images_of(once, order):
    """The images of the rows, one and two, for each sequence."""
    if "image_grid_thw" in once:
        sizes = once["image_grid_thw"].prod(1).tolist()
        images = once["pixel_values"].split([sizes[0], sizes[1] + sizes[2]])
        grids = once["image_grid_thw"].split([1, 2])
        return {
            name: torch.cat([parts[row] for row in order])
            for name, parts in (("pixel_values", images), ("image_grid_thw", grids))
        }
    images = once["pixel_values"].split([1, 2])
    return {"pixel_values": torch.cat([images[row] for row in order])}
