import pytest
import torch

from tests.families import FAMILIES, build, image
from trl_vlm.data.encoding import encode
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.models.generation import Policy
from trl_vlm.models.image_tokens import image_token_mask
from trl_vlm.models.masked_images import masked_inputs
from trl_vlm.pairs import DropoutNTP
from trl_vlm.pairs.dropout import cut_reply, without_images, word_ends
from trl_vlm.pairs.reply_tokens import ReplyTokens, added_text

REPLIES = ("A red square on a white wall.", "There is a dog, and a green tree", "a cat", "No.")


def make_rows(count=4):
    return [
        {
            "images": [image(place)] * (1 + place % 2),
            "prompt": [{"role": "user", "content": "What is it? " * (place + 1)}],
            "completion": [{"role": "assistant", "content": REPLIES[place]}],
            "margin": 0.5,
            ROW_NAME: f"train row {place}",
        }
        for place in range(count)
    ]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def policy(request):
    return Policy(*build(request.param, sharp=3))


def text(messages):
    return messages[0]["content"]


def short(**options):
    return DropoutNTP(**{"max_new_tokens": 6, **options})


@pytest.mark.parametrize("without", ["removed", "masked"])
def test_the_rejected_reply_begins_with_half_of_the_words_of_the_reference(policy, without):
    rows = make_rows()
    source = short(without=without)
    pairs = source(rows, policy)
    assert pairs[3] is None and source.dropped["the reply has one word"] == 1
    for row, pair, words, start in zip(rows, pairs, (3, 4, 1), ("A red square", "There is a dog,", "a"), strict=False):
        assert text(pair["rejected"]).startswith(start) and text(pair["rejected"]) != text(row["completion"])
        assert pair["pair_kept_words"] == words and pair["pair_source"] == "dropout-ntp"
        assert pair["chosen"] == row["completion"] and pair["images"] is row["images"] and "margin" not in pair


def by_definition(policy, row, without, limit):
    """The greedy continuation by `generate`, on the whole prompt with the kept words behind it."""
    model, processor = policy
    tokens = ReplyTokens.of(processor, text(row["completion"]))
    cut = cut_reply(tokens, policy, 0.5)
    context = [*tokens.ids[: cut.kept_tokens], *cut.forced_tokens]
    images = row["images"] if without == "masked" else []
    batch = encode(processor, [row["prompt"]], [images], add_generation_prompt=True)
    inputs = {**batch, "input_ids": torch.cat([batch["input_ids"], torch.tensor([context])], 1)}
    for name, value in batch.items():
        if name != "input_ids" and value.shape == batch["input_ids"].shape:
            filler = 1 if name == "attention_mask" else 0
            inputs[name] = torch.nn.functional.pad(value, (0, len(context)), value=filler)
    if without == "masked":
        hidden = image_token_mask(batch["input_ids"], model.config)
        inputs = masked_inputs(model, inputs, torch.nn.functional.pad(hidden, (0, len(context))))
    new = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0, inputs["input_ids"].size(1) :].tolist()
    return (text(row["completion"])[: cut.end] + added_text(processor.tokenizer, context, new)).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_continuation_is_that_of_generate_without_the_image(family):
    policy, rows = Policy(*build(family, sharp=3)), make_rows(3)
    for without in ("removed", "masked"):
        pairs = short(without=without, temperature=0)(rows, policy)
        assert [text(pair["rejected"]) for pair in pairs] == [by_definition(policy, row, without, 6) for row in rows]


@pytest.mark.parametrize("without", ["removed", "masked"])
def test_what_the_image_shows_changes_nothing(policy, without):
    rows = make_rows(2)
    others = [{**row, "images": [image(7)] * len(row["images"])} for row in rows]
    pairs = [short(without=without)(each, policy) for each in (rows, others)]
    assert [pair["rejected"] for pair in pairs[0]] == [pair["rejected"] for pair in pairs[1]]


def test_pairs_hang_on_seed_round_and_row_alone(policy):
    rows, source = make_rows(3), short(seed=3)
    together = source(rows, policy)
    assert together == [source([row], policy)[0] for row in rows]
    assert together == source(rows[::-1], policy)[::-1]
    assert together == short(seed=3, max_cache_gib=1e-6)(rows, policy)
    assert together != source(rows, policy, round=1) and together != short(seed=4)(rows, policy)


def test_places_of_images_go_with_them_and_texts_stay(policy):
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert without_images(prompt) == [prompt[0], {"role": "user", "content": parts[1:]}]
    row = {**make_rows(1)[0], "prompt": prompt[1:]}
    (pair,) = short(temperature=0)([row], policy)
    strings = {**row, "prompt": [{"role": "user", "content": "What is it?"}]}
    assert pair["rejected"] == short(temperature=0)([strings], policy)[0]["rejected"]


def test_words_end_before_white_space():
    assert word_ends("A red, square.\n\n- one") == [1, 6, 14, 17, 21]
    assert word_ends("") == []


@pytest.mark.parametrize(("ratio", "words"), [(0.01, 1), (0.5, 3), (0.6, 4), (0.99, 6)])
def test_a_share_of_the_words_is_kept_and_one_goes(policy, ratio, words):
    cut = cut_reply(ReplyTokens.of(policy.processor, REPLIES[0]), policy, ratio)
    assert (cut.words, REPLIES[0][: cut.end].count(" ")) == (words, words - 1)


def test_a_continuation_that_is_the_reference_or_nothing_gives_no_pair(policy):
    source = short()
    row = make_rows(1)[0]
    reply = ReplyTokens.of(policy.processor, REPLIES[0])
    cut = cut_reply(reply, policy, 0.5)
    rest = reply.ids[cut.kept_tokens + len(cut.forced_tokens) :]
    assert source._pair(row, reply, cut, rest, policy) is None
    assert source._pair(row, reply, cut, [], policy) is None
    assert source.dropped == {"the sample is the reference reply": 1, "nothing was added to the kept words": 1}


def test_rows_without_image_are_refused(policy):
    row = {**make_rows(1)[0], "images": []}
    with pytest.raises(ValueError, match="train row 0: it has no image, and this source takes it away"):
        short()([row], policy)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"start_ratio": 0}, "`start_ratio` is 0; it must be above 0 and below 1"),
        ({"start_ratio": 1.0}, "above 0 and below 1"),
        ({"without": "hidden"}, "must be 'masked' or 'removed'"),
        ({"temperature": -1}, "`temperature` is -1"),
        ({"max_cache_gib": 0}, "`max_cache_gib` is 0"),
    ],
)
def test_options_out_of_range_are_refused(options, fault):
    with pytest.raises(ValueError, match=fault):
        DropoutNTP(**options)
