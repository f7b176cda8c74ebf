"""Each row of a rollout is read with its own images, however TRL shuffles and splits it."""

import pytest
import torch
from torch.testing import assert_close
from trl.trainer.utils import (
    shuffle_sequence_dict,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from tests import families
from tests.trainers.ppo.helpers import count_letters, rows, settings
from trl_vlm import PPOTrainer
from trl_vlm.trainers.ppo.rollout_images import family_inputs, images_per_row, readable_images


def shuffled(batch, parts):
    """What TRL trains on: the rollout in another order, cut into parts."""
    mixed = shuffle_sequence_dict(split_pixel_values_by_grid(batch))
    return [unsplit_pixel_values_by_grid(part) for part in split_tensor_dict(mixed, parts)]


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "llava_onevision", "gemma4", "qwen2_5_vl"])
def test_rows_keep_their_images_through_trls_shuffle(family, tmp_path):
    # Two images, two, none and none are as many as there are rows.
    data = rows([2, 2, 0, 0])
    args = settings(tmp_path, per_device_train_batch_size=2, num_mini_batches=2, max_steps=1)
    folder = str(families.saved(family, sharp=6.0))
    trainer = PPOTrainer(folder, reward_funcs=count_letters, args=args, train_dataset=data)
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([trainer.train_dataset[row] for row in range(4)])
    for seed in range(3):
        torch.manual_seed(seed)
        for part in shuffled(dict(rollout), 2):
            with torch.no_grad():
                found = trainer._score_tokens(trainer.model, part)
            mask = part["completion_mask"]
            assert_close(found * mask, part["old_per_token_logps"] * mask, atol=1e-4, rtol=1e-4)


def test_pixels_that_come_once_per_row_are_counted_so():
    padded = {"pixel_values": torch.ones(3, 4, 3, 2, 2), "pixel_attention_mask": torch.ones(3, 4, 2, 2)}
    assert images_per_row(padded) == [1, 1, 1]
    assert images_per_row({**padded, "spatial_shapes": torch.ones(3, 2)}) is None  # LFM2-VL counts tiles
    assert images_per_row({"pixel_values": torch.ones(3, 3, 2, 2)}) is None


def test_rows_are_read_with_the_numbers_of_their_images_where_the_family_needs_them():
    config = families.build("llava_onevision")[0].config
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.long), "pixel_values": torch.ones(3, 5, 3, 2, 2)}
    assert readable_images(inputs, config, [1, 0, 2])["batch_num_images"].tolist() == [1, 2]
    assert "batch_num_images" not in inputs
    assert "batch_num_images" not in family_inputs(config, {"batch_num_images": torch.ones(2)}, 3)


def test_rows_without_images_are_read_without_image_inputs():
    config, ids = families.build("llava")[0].config, torch.ones(1, 5, dtype=torch.long)
    empty = {"input_ids": ids, "pixel_values": torch.ones(0, 3, 2, 2), "token_type_ids": ids}
    assert sorted(readable_images(empty, config, [0])) == ["input_ids", "token_type_ids"]
    padding = {"pixel_values": torch.ones(1, 1, 3, 2, 2), "pixel_attention_mask": torch.zeros(1, 1, 2, 2)}
    assert sorted(readable_images({"input_ids": ids, **padding}, config, [1])) == ["input_ids"]


def test_replies_of_paligemma_are_read_causally():
    config = families.build("paligemma")[0].config
    types = torch.zeros(1, 5, dtype=torch.long)
    assert family_inputs(config, {"token_type_ids": types}, 2)["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert types.sum() == 0
