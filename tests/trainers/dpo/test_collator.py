"""What is added to TRL's preference batches, and what is left as TRL made it."""

import copy
import pickle

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from tests.families import FAMILIES, build, image
from tests.preference_rows import preference_row
from trl_vlm.trainers.dpo.collator import ImagesOnce, PreferenceCollator
from trl_vlm.trainers.dpo.segments import SegmentOptions


def collator(processor, **options):
    collate = DataCollatorForVisionPreference(processor, max_length=options.pop("max_length", None))
    return PreferenceCollator(collate, vision=True, tokenizer=processor.tokenizer, **options)


def rows(images=(1, 2, 0)):
    return [preference_row(seed, count) for seed, count in enumerate(images)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_trls_and_pixels_come_once_per_row(family):
    _, processor = build(family)
    wanted = DataCollatorForVisionPreference(processor)(copy.deepcopy(rows()))
    plain, shared = collator(processor)(rows()), collator(processor, shares_prefix=True)(rows())
    assert plain.keys() == wanted.keys() == shared.keys() - {"shared_prefix"}
    for key, value in wanted.items():
        assert torch.equal(plain[key], value), key
        if value.shape == wanted["input_ids"].shape:
            assert torch.equal(shared[key], value), key
        else:  # pixels, and what belongs to them: chosen rows, then the same for the rejected ones
            assert torch.equal(torch.cat([shared[key]] * 2), value), key


@pytest.mark.parametrize("options", [{}, {"shares_prefix": True}, {"shares_prefix": True, "extra": 1}])
def test_rows_are_not_changed(options):
    _, processor = build("llava")
    given = [row | {"rejected_extra": [row["rejected"]]} for row in rows()]
    before = copy.deepcopy(given)
    collate = collator(processor, segments=SegmentOptions(), **options)
    first, second = collate(given), collate(given)
    assert [str(row) for row in given] != []
    for row, old in zip(given, before, strict=True):
        assert row.keys() == old.keys()
        assert all(row[key] == old[key] for key in row if key != "images")
    for key, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[key])), key


def test_paths_bytes_and_single_images_are_loaded(tmp_path):
    _, processor = build("llava")
    picture = image(3)
    picture.save(tmp_path / "a.png")
    row = preference_row(0, 0)
    variants = [
        {"images": [picture]},
        {"images": [str(tmp_path / "a.png")]},
        {"images": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}]},
        {"image": picture, "images": None},
    ]
    pixels = [collator(processor, shares_prefix=True)([row | variant])["pixel_values"] for variant in variants]
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])


def test_a_missing_image_file_is_an_error_that_names_the_row(tmp_path):
    _, processor = build("llava")
    with pytest.raises(ValueError, match="row 0 of the batch, image 0"):
        collator(processor)([preference_row(0, 0) | {"images": [str(tmp_path / "none.png")]}])


def test_image_tokens_that_max_length_cuts_off_are_an_error_that_names_the_row():
    _, processor = build("llava")
    with pytest.raises(ValueError, match="row 0 of the batch"):
        collator(processor, max_length=5, shares_prefix=True)(rows((2, 1)))


def test_a_reply_that_max_length_cuts_off_is_an_error_that_names_the_row():
    _, processor = build("llava")
    batch = collator(processor)(rows((1,)))
    prompt = int((batch["attention_mask"].sum(1) - batch["completion_mask"].sum(1))[0])
    with pytest.raises(ValueError, match="row 0 of the batch: the chosen reply has no token left"):
        collator(processor, max_length=prompt)(rows((1,)))


def test_a_row_that_mentions_an_image_which_it_lacks_is_an_error():
    _, processor = build("llava")
    row = preference_row(0, 0)
    row["prompt"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    with pytest.raises(
        ValueError, match="row 0 of the batch: the row has 0 image\\(s\\), and its prompt has places for 1"
    ):
        collator(processor, shares_prefix=True)([row])


def test_extra_replies_follow_the_rejected_ones():
    _, processor = build("qwen2_5_vl")
    replies = [[{"role": "assistant", "content": text}] for text in ("No.", "A dog.")]
    given = [row | {"rejected_extra": replies} for row in rows((1, 2))]
    wanted = collator(processor)(rows((1, 2)))
    for share in (False, True):
        batch = collator(processor, shares_prefix=share, extra=2)(given)
        assert len(batch["input_ids"]) == 8
        decoded = [
            processor.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).strip()
            for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]
        assert decoded[4:] == ["No.", "No.", "A dog.", "A dog."]
        assert decoded[:2] == [row["chosen"][0]["content"] for row in rows((1, 2))]
        copies = len(batch["pixel_values"]) * 2 // len(wanted["pixel_values"])
        assert copies == (1 if share else 4)


def test_the_shared_prefix_says_row_and_length_of_the_prompt():
    tokenizer = build("llava")[1].tokenizer
    collate = PreferenceCollator(
        DataCollatorForPreference(pad_token_id=0), vision=False, tokenizer=tokenizer, shares_prefix=True
    )
    batch = collate(
        [
            {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [8]},
            {"prompt_ids": [5, 6], "chosen_ids": [8], "rejected_ids": [9, 8, 7]},
        ]
    )
    assert batch["shared_prefix"].tolist() == [[0, 3], [1, 2], [0, 3], [1, 2]]


def test_changed_tokens_stand_where_their_log_probabilities_stand():
    tokenizer = build("llava")[1].tokenizer
    collate = PreferenceCollator(
        DataCollatorForPreference(pad_token_id=0), vision=False, tokenizer=tokenizer, segments=SegmentOptions()
    )
    row = {
        "prompt_ids": [5, 6, 7],
        "chosen_ids": [10, 11, 12, 40, 13, 14, 15],
        "rejected_ids": [10, 11, 12, 13, 14, 15],
    }
    batch = collate([row])
    (changed,) = batch["changed_tokens"]
    # Token 40 is the seventh of its sequence (index 6), so its log-probability is at index 5.
    assert changed.nonzero().tolist() == [[0, 5]]
    assert torch.equal(batch["input_ids"][:, 1:][changed], torch.tensor([40]))


@pytest.mark.parametrize("spans", [[[0, 1000]], [[4, 4]], [[-1, 2]]])
def test_spans_outside_the_reply_are_an_error_that_names_the_row(spans):
    _, processor = build("llava")
    row = preference_row(0, 1) | {"chosen_spans": spans}
    with pytest.raises(ValueError, match="row 0 of the batch, column 'chosen_spans': the span .* is not inside the"):
        collator(processor, segments=SegmentOptions())([row])


def test_a_template_that_renders_one_prompt_in_two_ways_is_refused():
    class Processor:
        def __call__(self, **_):
            raise AssertionError("not reached")

    once = ImagesOnce(Processor())
    once.rows = 1
    with pytest.raises(ValueError, match="depending on the reply: 'a' and 'b'"):
        once(text=["a", "b"], images=None)


def test_a_collator_travels_to_a_worker():
    _, processor = build("llava")
    collate = pickle.loads(pickle.dumps(collator(processor, shares_prefix=True)))
    assert collate(rows((1,)))["shared_prefix"].shape == (2, 2)
