import pytest
import torch
from transformers import LlamaConfig, ProcessorMixin

from tests.families import FAMILIES, _tokenizer, batch, build, image
from trl_vlm.models.image_tokens import (
    check_image_tokens,
    features_per_row,
    image_token_id,
    image_token_mask,
    placeholders_per_row,
)

NAMES = ["row 7", "row 8", "row 9"]
ROWS = [1, 2, 0]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return build(request.param)


class TestEveryFamily:
    def test_config_and_processor_name_the_same_token(self, family):
        model, processor = family
        assert image_token_id(model.config) == image_token_id(processor)

    def test_the_features_are_those_that_the_model_computes(self, family):
        model, processor = family
        rows = batch(processor, ROWS)
        counted = features_per_row(rows, ROWS, processor)
        names = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes")
        pixels = {name: rows[name] for name in names if name in rows}
        computed = model.get_image_features(**pixels, return_dict=True).pooler_output
        tensors = [computed] if isinstance(computed, torch.Tensor) else computed
        assert sum(counted) == sum(tensor.shape[:-1].numel() for tensor in tensors)
        assert counted == placeholders_per_row(rows["input_ids"], processor)
        assert counted[2] == 0

    def test_an_honest_batch_passes(self, family):
        for rows in (ROWS, [2, 0, 1], [0, 0, 0]):
            check_image_tokens(batch(family[1], rows), rows, family[1], NAMES)

    def test_a_row_that_lost_an_image_token_is_named(self, family):
        rows = batch(family[1], ROWS)
        row, column = image_token_mask(rows["input_ids"], family[1]).nonzero()[-1]
        rows["input_ids"][row, column] = 9
        with pytest.raises(
            ValueError, match=r"^row 8: its text has \d+ image placeholders for 2 image\(s\).*max_length"
        ):
            check_image_tokens(rows, ROWS, family[1], NAMES)

    def test_a_row_with_a_placeholder_of_its_own_is_named(self, family):
        rows = batch(family[1], ROWS)
        rows["input_ids"][2, 0] = image_token_id(family[1])
        with pytest.raises(ValueError, match=r"^row 9: its text has 1 image placeholders for 0 image\(s\)"):
            check_image_tokens(rows, ROWS, family[1], NAMES)

    def test_images_counted_for_the_wrong_rows_are_an_error(self, family):
        rows = batch(family[1], ROWS)
        with pytest.raises(ValueError, match=r"^row 7: its text has \d+ image placeholders for 0 image\(s\)"):
            check_image_tokens(rows, [0, 3, 0], family[1], NAMES)


def tiled_rows(processor):
    """InternVL cuts a wide image into tiles: one image of several tiles, one of a single tile."""
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    rows = processor(
        text=[text, text],
        images=[[image(0, 224, 56)], [image(1, 56, 56)]],
        padding=True,
        return_tensors="pt",
        crop_to_patches=True,
    )
    assert len(rows["pixel_values"]) > 2
    return dict(rows)


def test_tiles_of_unknown_number_are_checked_as_a_whole():
    _, processor = build("internvl")
    rows = tiled_rows(processor)
    assert features_per_row(rows, [1, 1], processor) is None
    check_image_tokens(rows, [1, 1], processor, NAMES[:2])
    mask = image_token_mask(rows["input_ids"], processor)
    one_lost = {**rows, "input_ids": rows["input_ids"].clone()}
    one_lost["input_ids"][0, mask[0].nonzero()[-1]] = 9
    with pytest.raises(ValueError, match="^row 7: its text has 19 image placeholders .* tiles of 4 features"):
        check_image_tokens(one_lost, [1, 1], processor, NAMES[:2])
    tile_lost = {**rows, "input_ids": rows["input_ids"].clone()}
    tile_lost["input_ids"][0, mask[0].nonzero()[-4:]] = 9
    with pytest.raises(ValueError, match=r"20 image placeholders \(row 7: 16, row 8: 4\).*6 tiles give 24 features"):
        check_image_tokens(tile_lost, [1, 1], processor, NAMES[:2])


def test_counts_and_names_must_fit_the_batch():
    _, processor = build("llava")
    with pytest.raises(ValueError, match="3 rows came with 2 image counts and 3 names"):
        check_image_tokens(batch(processor, ROWS), [1, 2], processor, NAMES)


def test_a_config_without_images_is_refused():
    with pytest.raises(ValueError, match="LlamaConfig does not say which token stands for an image"):
        image_token_id(LlamaConfig())


class TestGemma4:
    """Its `image_seq_length` is the most that an image may have."""

    def test_an_honest_batch_passes(self):
        _, processor = build("gemma4")
        rows = batch(processor, ROWS)
        found = placeholders_per_row(rows["input_ids"], processor)
        assert 0 < found[0] < processor.image_seq_length
        check_image_tokens(rows, ROWS, processor, NAMES)

    @pytest.mark.parametrize("kept, cut", [(1, True), (200, False)])
    def test_too_few_and_too_many_placeholders_are_named(self, kept, cut):
        _, processor = build("gemma4")
        rows = batch(processor, ROWS)
        rows["input_ids"][1] = 9
        rows["input_ids"] = torch.cat([rows["input_ids"], torch.full((3, 100), 9)], 1)
        rows["input_ids"][1, :kept] = image_token_id(processor)
        remedy = "Its text was cut" if cut else "Its text holds placeholders"
        with pytest.raises(ValueError, match=rf"row 8: .* have up to 70 features each. {remedy}"):
            check_image_tokens(rows, ROWS, processor, NAMES)


def stranger(pixels):
    """The processor of a family that is not in the table, and a batch of two rows, the first with an image."""
    _, processor = build("llava")
    strange = type("StrangeProcessor", (ProcessorMixin,), {"__init__": lambda self: None})()
    strange.tokenizer, strange.image_seq_length = processor.tokenizer, 100
    ids = torch.tensor([[9, image_token_id(processor), 9], [9, 9, 9]])
    return strange, {"input_ids": ids, **pixels}


# LFM2-VL's mask is one of patches, and other families have keys of their own.
@pytest.mark.parametrize("pixels", [{"pixel_attention_mask": torch.ones(1, 4)}, {"image_sizes": torch.ones(1, 2)}])
def test_of_an_unknown_family_placeholders_and_images_need_only_come_together(pixels):
    processor, rows = stranger({"pixel_values": torch.ones(1, 4, 12), **pixels})
    assert features_per_row(rows, [1, 0], processor) is None
    check_image_tokens(rows, [1, 0], processor, NAMES[:2])
    with pytest.raises(ValueError, match=r"^row 7: its text has 1 image placeholders for 0 image\(s\)"):
        check_image_tokens(rows, [0, 0], processor, NAMES[:2])
    with pytest.raises(ValueError, match=r"^row 8: its text has 0 image placeholders for 1 image\(s\)"):
        check_image_tokens(rows, [1, 1], processor, NAMES[:2])


def test_ovis2_has_another_token_in_its_ids_than_its_processor_names():
    tokenizer = _tokenizer("<image>", "<IMG_ATOM>")
    kind = type("Ovis2Processor", (ProcessorMixin,), {"__init__": lambda self: None})
    processor = kind()
    processor.tokenizer, processor.image_token_id = tokenizer, tokenizer.convert_tokens_to_ids("<image>")
    assert image_token_id(processor) == tokenizer.convert_tokens_to_ids("<IMG_ATOM>")
