"""Characters to tokens, in texts whose tokens end inside characters."""

import random

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tests.families import load_processor
from tests.preference_rows import preference_row
from trl_vlm.maths.changed_tokens import tokens_in_spans
from trl_vlm.trainers.dpo.collator import PreferenceCollator
from trl_vlm.trainers.dpo.segments import SegmentOptions
from trl_vlm.trainers.dpo.spans import token_places

TEXT = "Ein größerer Kater – 猫が窓辺で眠る, naïve café 🐈‍⬛ und ÄÖÜ, ещё одна кошка."
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def places_by_bytes(tokenizer, ids, text):
    """From the bytes that a byte-level tokenizer writes its tokens in."""
    character_of_byte = [place for place, character in enumerate(text) for _ in character.encode()]
    places, byte = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        length = len(bytes(BYTE_OF[character] for character in token))
        places.append((character_of_byte[byte], character_of_byte[byte + length - 1] + 1))
        byte += length
    return places


class WithoutOffsets:
    """A tokenizer that only decodes, as those that are not fast."""

    is_fast = False

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode


@pytest.fixture(params=["by its offsets", "by decoding"])
def tokenizer(request):
    fast = load_processor("llava").tokenizer
    return fast, fast if request.param == "by its offsets" else WithoutOffsets(fast)


def test_400_random_spans_mark_the_tokens_whose_bytes_are_in_them(tokenizer):
    fast, tested = tokenizer
    ids = fast(TEXT, add_special_tokens=False).input_ids
    text, places = token_places(tested, ids)
    assert text == TEXT
    wanted, draws = places_by_bytes(fast, ids, TEXT), random.Random(0)
    assert len(ids) > len(TEXT)  # many characters are several tokens
    for _ in range(400):
        start, end = sorted(draws.sample(range(len(TEXT) + 1), 2))
        assert tokens_in_spans(places, [(start, end)]) == tokens_in_spans(wanted, [(start, end)]), TEXT[start:end]


def test_another_tokenization_of_the_same_text_is_placed_too():
    tokenizer = load_processor("llava").tokenizer
    ids = [token for character in TEXT for token in tokenizer(character, add_special_tokens=False).input_ids]
    assert ids != tokenizer(TEXT, add_special_tokens=False).input_ids
    assert token_places(tokenizer, ids) == (TEXT, places_by_bytes(tokenizer, ids, TEXT))


def test_spans_of_a_reply_are_found_behind_white_space_that_a_template_strips():
    processor = load_processor("gemma3")
    row = preference_row(0) | {"chosen": [{"role": "assistant", "content": f"  {TEXT} \n"}]}
    start = 2 + TEXT.index("猫")
    row |= {"chosen_spans": [[start, start + 1]], "rejected_spans": []}
    collate = PreferenceCollator(
        DataCollatorForVisionPreference(processor),
        vision=True,
        tokenizer=processor.tokenizer,
        segments=SegmentOptions(),
    )
    batch = collate([row])
    marked = batch["input_ids"][0, 1:][batch["changed_tokens"][0, 0]]
    assert "猫" in processor.tokenizer.decode(marked)
    assert len(processor.tokenizer.decode(marked)) <= 2
