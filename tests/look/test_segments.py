"""What the page colors is what Dense DPO weighs."""

import pytest
import torch
from torch.testing import assert_close

from tests.families import load_processor, saved
from tests.trainers.dpo.helpers import make
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.look.segments import Segments, load_segments
from trl_vlm.maths.segments import segment_weights

PAIRS = [
    ("The image shows a dog next to a bench.", "The image shows two cats next to a bench."),
    ("A red cup stands on the table.", "A red cup and a fork stand on the table, near a window."),
    ("Two dogs run.", "Three dogs run."),
    ("Yes.", "No, there is nothing."),
    ("a 👩‍👩 b 𝒳 c", "a b 𝒳 d"),
]
SPANS = [None, None, [(0, 3)], None, [(2, 5)]]


def trained_characters(trainer, row, column):
    """The characters of a reply whose tokens the trainer's collator marks, white space left out."""
    batch = trainer.data_collator([row])
    sequence = ("chosen", "rejected").index(column)
    is_reply = batch["completion_mask"][sequence].bool()
    changed = batch["changed_tokens"][0, sequence][is_reply[1:]].tolist()
    ids = batch["input_ids"][sequence][is_reply].tolist()
    decode = trainer.data_collator.tokenizer.decode
    ends = [len(decode(ids[: end + 1], clean_up_tokenization_spaces=False)) for end in range(len(ids))]
    text = decode(ids, clean_up_tokenization_spaces=False)
    reply = row[column][0]["content"]
    start, place, marked = text.find(reply), 0, set()
    assert start >= 0
    for end, is_changed in zip(ends, changed, strict=True):
        marked |= set(range(place - start, end - start)) if is_changed else set()
        place = end
    weights = segment_weights(torch.tensor([changed]), torch.ones(1, len(ids)).bool(), gamma=5.0, reduction="mean")
    share = weights[0, torch.tensor(changed, dtype=torch.bool)].sum()
    return {place for place in marked if 0 <= place < len(reply) and not reply[place].isspace()}, share


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_marked_segments_are_those_that_the_trainer_weighs(family, tmp_path):
    trainer = make(DPOTrainer, DPOConfig, tmp_path, family, dense_preset="paper", share_prefix=False)
    segments = load_segments(str(saved(family)))
    assert segments.unit == "tokens"
    for (chosen, rejected), spans in zip(PAIRS, SPANS, strict=True):
        row = {"images": [], "prompt": [{"role": "user", "content": "What is there?"}]}
        row |= {
            column: [{"role": "assistant", "content": text}]
            for column, text in zip(("chosen", "rejected"), (chosen, rejected), strict=True)
        }
        row |= {} if spans is None else {"rejected_spans": spans}
        sides = segments.of_pair(chosen, rejected, None, spans)
        for column, side, reply in zip(("chosen", "rejected"), sides, (chosen, rejected), strict=True):
            shown = {place for mark in side.marks for place in range(mark.start, mark.end)}
            wanted, share = trained_characters(trainer, row, column)
            assert {place for place in shown if not reply[place].isspace()} == wanted, (chosen, rejected, column)
            assert {mark.weight for mark in side.marks} <= {5.0}
            # Templates differ in how many tokens end a reply; here it is one.
            assert abs(side.share - float(share)) < 0.06


def test_without_a_tokenizer_words_are_compared_and_the_page_says_so():
    chosen, rejected = Segments().of_pair("a dog, here", "a cat, here")
    assert [("a dog, here"[m.start : m.end], m.kind) for m in chosen.marks] == [("dog", "added")]
    assert [("a cat, here"[m.start : m.end], m.kind) for m in rejected.marks] == [("cat", "removed")]
    assert (chosen.changed, chosen.units) == (1, 4)
    assert_close(chosen.share, 5 / (5 + 4))  # the reply's end weighs 1
    assert "by words, not by the tokens" in Segments().about


def test_spans_of_a_row_go_before_the_comparison():
    chosen, rejected = Segments().of_pair("a b c", "a b d", rejected_spans=[(0, 1)])
    assert [tuple(mark)[:2] for mark in chosen.marks] == [(4, 5)]
    assert [tuple(mark)[:2] for mark in rejected.marks] == [(0, 1)]


def test_equal_and_empty_replies_have_no_segment():
    for replies in (("a b", "a b"), ("", "")):
        assert all(side.marks == [] and side.share == 0 for side in Segments().of_pair(*replies))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json at"):
        load_segments(str(tmp_path))


def test_a_weight_below_one_is_refused():
    with pytest.raises(ValueError, match=r"gamma is 0\.5; a changed token weighs at least 1"):
        load_segments(gamma=0.5)


def test_the_tokenizer_is_that_of_the_model():
    processor = load_processor("llava")
    segments = load_segments(str(saved("llava")))
    ids = segments.tokenizer.encode("A red cup.", add_special_tokens=False).ids
    assert ids == processor.tokenizer("A red cup.", add_special_tokens=False).input_ids
