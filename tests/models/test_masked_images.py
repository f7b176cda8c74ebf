"""Hidden image tokens: as if a mask on keys were added inside the attention, with nothing else changed."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from tests.families import FAMILIES, batch, build
from trl_vlm.doctor.key_mask import hidden_keys
from trl_vlm.models.image_tokens import image_token_mask
from trl_vlm.models.masked_images import draw_hidden, masked_inputs

ROWS = [1, 2]
STEPS = 5


def rows_of(processor, seed=0, padding_side="left"):
    rows = batch(processor, ROWS, padding_side=padding_side, seed=seed, size=(60, 60))
    rows.pop("labels", None)
    return rows


@pytest.fixture(scope="module", params=[*FAMILIES, "llava_onevision", "qwen3_vl_moe"])
def family(request):
    model, processor = build(request.param, sharp=8)
    rows = rows_of(processor)
    if "image_grid_thw" in rows:
        assert (rows["image_grid_thw"][:, 1:] >= 4).all()  # two lines and columns, merged
    return model, processor, rows


def greedy_logits(model, inputs, **settings):
    """(B, STEPS, V), of greedy decoding."""
    output = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=[model.config.image_token_id],  # without a cache it would be read as one more image token
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return torch.stack(output.logits, dim=1)


def reference_logits(model, inputs, hidden):
    """Without a cache, on the unmasked prompt, so that positions and windows are those of the prompt."""
    with hidden_keys(model, hidden):
        return greedy_logits(model, inputs, use_cache=False)


def generators(count=2, seed=0):
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


class TestEveryFamily:
    @pytest.mark.parametrize("share", [1.0, 0.5])
    def test_logits_of_cached_steps_are_those_of_a_mask_inside_the_attention(self, family, share):
        model, _, rows = family
        hidden = draw_hidden(rows["input_ids"], model.config, share, generators())
        wanted = reference_logits(model, rows, hidden)
        assert (wanted - greedy_logits(model, rows)).abs().max() > 0.1  # the image matters
        found = greedy_logits(model, masked_inputs(model, rows, hidden))
        assert_close(found, wanted, rtol=0, atol=1e-5)

    def test_a_plain_forward_gives_the_first_of_them_with_padding_on_either_side(self, family):
        model, processor, rows = family
        hidden = draw_hidden(rows["input_ids"], model.config, 0.5, generators())
        wanted = reference_logits(model, rows, hidden)[:, 0]
        assert_close(model(**masked_inputs(model, rows, hidden)).logits[:, -1], wanted, rtol=0, atol=1e-5)
        right = rows_of(processor, padding_side="right")
        hidden = draw_hidden(right["input_ids"], model.config, 0.5, generators())
        logits = model(**masked_inputs(model, right, hidden)).logits
        last = right["attention_mask"].sum(1) - 1
        assert_close(logits[torch.arange(2), last], wanted, rtol=0, atol=1e-5)

    def test_hiding_nothing_changes_nothing(self, family):
        model, _, rows = family
        hidden = draw_hidden(rows["input_ids"], model.config, 0.0, generators())
        assert not hidden.any()
        assert_close(greedy_logits(model, masked_inputs(model, rows, hidden)), greedy_logits(model, rows))

    def test_with_everything_hidden_pixels_do_not_matter(self, family):
        model, processor, rows = family
        others = rows_of(processor, seed=1)
        assert (greedy_logits(model, rows) - greedy_logits(model, others)).abs().max() > 1e-2
        hidden = draw_hidden(rows["input_ids"], model.config, 1.0, generators())
        assert torch.equal(hidden, image_token_mask(rows["input_ids"], model.config))
        blind = [greedy_logits(model, masked_inputs(model, inputs, hidden)) for inputs in (rows, others)]
        assert_close(*blind, rtol=0, atol=1e-6)

    def test_neither_rows_nor_inputs_are_modified(self, family):
        model, _, rows = family
        before = {name: value.clone() for name, value in rows.items()}
        hidden = draw_hidden(rows["input_ids"], model.config, 0.5, generators())
        masked = masked_inputs(model, rows, hidden)
        assert masked["attention_mask"].sum() == rows["attention_mask"].sum() - hidden.sum()
        assert rows.keys() == before.keys()
        assert all(torch.equal(rows[name], before[name]) for name in before)


def test_a_share_is_the_expected_share_and_a_larger_one_hides_more_of_the_same_draw():
    config = build("llava")[0].config
    ids = torch.full((1, 20_000), config.image_token_id)
    low, high = (draw_hidden(ids, config, share, generators(1)) for share in (0.9, 0.99))
    for share, hidden in ((0.9, low), (0.99, high)):
        assert hidden.float().mean() == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)
    assert (high | ~low).all()


def test_by_hand_a_token_is_visible_if_its_draw_reaches_the_share():
    config = build("llava")[0].config
    image = config.image_token_id
    rho = torch.rand(3, generator=generators(1)[0])
    hidden = draw_hidden(torch.tensor([[9, image, image, 9, image]]), config, float(rho[1]), generators(1))
    assert hidden[0].tolist() == [False, bool(rho[0] < rho[1]), False, False, bool(rho[2] < rho[1])]


def test_a_draw_depends_on_the_row_alone():
    model, processor = build("llava")
    left, right = rows_of(processor), rows_of(processor, padding_side="right")
    drawn = [draw_hidden(rows["input_ids"], model.config, 0.5, generators()) for rows in (left, right)]
    alone = draw_hidden(left["input_ids"][1:], model.config, 0.5, generators(1, seed=1))
    for row in range(2):
        pieces = [
            hidden[row][image_token_mask(rows["input_ids"], processor)[row]]
            for hidden, rows in zip(drawn, (left, right), strict=True)
        ]
        assert torch.equal(*pieces)
    assert torch.equal(alone[0], drawn[0][1])


def test_a_peft_model_and_bfloat16_take_masked_inputs():
    model, processor = build("qwen2_5_vl", sharp=8)
    rows = rows_of(processor)
    hidden = draw_hidden(rows["input_ids"], model.config, 0.5, generators())
    wanted = greedy_logits(model, masked_inputs(model, rows, hidden))
    peft = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()  # B is zero: changes nothing
    assert_close(greedy_logits(peft, masked_inputs(peft, rows, hidden)), wanted)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in rows.items()}
    assert greedy_logits(peft.bfloat16(), masked_inputs(peft, half, hidden)).isfinite().all()


class TestRefusals:
    def test_a_row_without_an_image_is_named(self):
        model, processor = build("llava")
        ids = batch(processor, [1, 0])["input_ids"]
        with pytest.raises(ValueError, match="^train row 7: it has no image token, so there is nothing to hide"):
            draw_hidden(ids, model.config, 0.5, generators(), names=["train row 6", "train row 7"])
        with pytest.raises(ValueError, match="^row 1 of the batch: it has no image token"):
            draw_hidden(ids, model.config, 0.5, generators())

    def test_families_without_image_tokens_are_refused(self):
        ids = torch.zeros(1, 3, dtype=torch.long)
        with pytest.raises(ValueError, match="LlamaConfig does not say which token stands for an image"):
            draw_hidden(ids, transformers.LlamaConfig(), 0.5, generators(1))
        with pytest.raises(ValueError, match="mllama reads images by cross-attention"):
            draw_hidden(ids, transformers.MllamaConfig(), 0.5, generators(1))

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
    def test_a_share_is_from_0_to_1(self, share):
        with pytest.raises(ValueError, match="`mask_ratio` is .*must be from 0 to 1"):
            draw_hidden(torch.zeros(1, 3), build("llava")[0].config, share, generators(1))

    def test_text_is_never_hidden(self):
        model, processor = build("llava")
        rows = rows_of(processor)
        hidden = image_token_mask(rows["input_ids"], processor)
        hidden[1, -1] = True
        with pytest.raises(ValueError, match=r"^row 1 of the batch: `hidden` is True at token \d+, which is no image"):
            masked_inputs(model, rows, hidden)
        with pytest.raises(ValueError, match=r"`hidden` is \(2, 3\) and the token ids are"):
            masked_inputs(model, rows, hidden[:, :3])

    def test_qwen_without_token_types_is_refused(self):
        model, processor = build("qwen2_vl")
        rows = rows_of(processor)
        hidden = image_token_mask(rows["input_ids"], processor)
        del rows["mm_token_type_ids"]
        with pytest.raises(ValueError, match="`image_grid_thw` and no `mm_token_type_ids`"):
            masked_inputs(model, rows, hidden)
