import copy
import itertools
import re

import pytest
import torch
from PIL import Image

from tests.families import build, image
from trl_vlm.data.checks import check_dataset
from trl_vlm.judges import Answer, Request, ScriptedJudge, Verdict
from trl_vlm.models.generation import Policy, Reply, SampledElsewhere, generating
from trl_vlm.pairs.corruption import NOT_REWRITTEN, REFUSED, UNCHANGED, Corrupted, rewritten_reply
from trl_vlm.pairs.judged import Judged, best_and_worst
from trl_vlm.pairs.samples import SAME_AS_REFERENCE, SelfSamples, sampled_replies

LONGER = ScriptedJudge(
    lambda pair: None if len(pair.first) == len(pair.second) else int(len(pair.second) > len(pair.first))
)


def row(number, images):
    return {
        "row_name": f"train row {number}",
        "images": images,
        "prompt": [{"role": "user", "content": "What is in the image? " * (number + 1)}],
        "completion": [{"role": "assistant", "content": f"A red square, {number}."}],
        "margin": 0.5,
        "kept": number,
    }


ROWS = [row(0, [image(0)]), row(1, []), row(2, [image(1), image(2)])]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def policy(request):
    return Policy(*build(request.param, sharp=4))


def judged(rows, policy, judge=LONGER, round=0, **options):
    source = Judged(judge, **{"max_new_tokens": 6, "seed": 3, **options})
    with generating(policy.model):
        return source(rows, policy, round), source


def text(row, side):
    (message,) = row[side]
    return message["content"]


def test_the_judge_decides_about_samples_of_rows_with_any_number_of_images(policy):
    before = copy.deepcopy(ROWS)
    rows, source = judged(ROWS, policy)
    assert before == ROWS
    assert [each is None for each in rows] == [False] * 3 or source.dropped
    for made, old in zip(rows, ROWS, strict=True):
        if made is not None:
            assert len(text(made, "chosen")) > len(text(made, "rejected"))
            assert made["pair_source"] == "judged" and made["kept"] == old["kept"]
            assert "margin" not in made  # it was about the old replies
            assert made["completion"] == old["completion"] and made["images"] is old["images"]
    assert sum(made is None for made in rows) == source.dropped.total()
    assert any(made is not None for made in rows)


def test_pairs_hang_on_seed_turn_and_row_alone(policy):
    together, _ = judged(ROWS, policy)
    assert together == [judged([each], policy)[0][0] for each in ROWS]
    assert together == judged(ROWS[::-1], policy)[0][::-1]
    assert together != judged(ROWS, policy, round=1)[0]
    assert together != judged(ROWS, policy, seed=4)[0]


def test_a_limit_of_memory_splits_the_samples_and_changes_none(policy):
    sizes = []
    hook = policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    wanted, _ = judged(ROWS, policy)
    assert max(sizes) == 6  # two replies to each of three rows
    sizes.clear()
    assert judged(ROWS, policy, max_cache_gib=1e-6)[0] == wanted and max(sizes) == 1
    hook.remove()


def test_samples_follow_the_probabilities_of_the_model(policy):
    """The first token of 600 samples against softmax(logits / temperature), in total variation."""
    settings = {"temperature": 0.8, "max_new_tokens": 1, "seed": 0, "round": 0}
    rows = [{**ROWS[0], "row_name": f"row {n}"} for n in range(60)]
    tokenizer = policy.processor.tokenizer
    with generating(policy.model):
        kept = []
        hook = policy.model.register_forward_hook(lambda *call: kept.append(call[-1].logits[0, -1]))
        drawn = [sample for each in sampled_replies(rows, policy, replies=10, **settings) for sample in each]
        hook.remove()
    expected = torch.softmax(kept[0].float() / 0.8, -1)
    probabilities: dict[str, float] = {}
    for token, probability in enumerate(expected.tolist()):
        name = tokenizer.decode([token], skip_special_tokens=True).strip()
        probabilities[name] = probabilities.get(name, 0.0) + probability
    counts = {name: sum(sample.text == name for sample in drawn) / len(drawn) for name in probabilities}
    assert sum(counts.values()) == pytest.approx(1)
    assert sum(abs(counts[name] - probabilities[name]) for name in probabilities) / 2 < 0.2


def test_what_the_judge_does_not_decide_is_counted_and_dropped(policy):
    rows, source = judged(ROWS, policy, judge=ScriptedJudge(lambda pair: None))
    assert rows == [None] * 3
    assert source.dropped == {"no decision": 3}


def test_all_replies_are_compared_with_each_other(policy):
    seen = []

    def longest(pair):
        seen.append((pair.row["row_name"], pair.first, pair.second))
        return LONGER.choose(pair)

    rows, _ = judged(ROWS[:1], policy, judge=ScriptedJudge(longest), replies=4)
    assert len(seen) == 6
    replies = {reply for _, *pair in seen for reply in pair}
    assert {len(text(rows[0], "chosen")), len(text(rows[0], "rejected"))} == {
        max(map(len, replies)),
        min(map(len, replies)),
    }


def verdicts(replies, wins):
    """From pairs (winner, loser)."""
    for first, second in itertools.combinations(range(replies), 2):
        yield Verdict(0 if (first, second) in wins else 1 if (second, first) in wins else None)


@pytest.mark.parametrize(
    ("replies", "wins", "expected"),
    [
        (2, {(1, 0)}, (1, 0)),
        (2, set(), None),
        (3, {(0, 1), (1, 2), (0, 2)}, (0, 2)),
        (3, {(0, 1), (1, 2), (2, 0)}, None),  # a circle
        (3, {(2, 0)}, (2, 0)),
        (3, {(0, 1), (0, 2)}, (0, 1)),  # two equally bad: the one drawn first
        # 0 and 1 have the best record, 2 and 3 the worst, but 3 beat 0: that pair is none.
        (4, {(0, 1), (0, 2), (1, 2), (3, 0), (1, 3), (2, 3)}, (0, 2)),
    ],
)
def test_the_pair_has_the_largest_difference_of_wins(replies, wins, expected):
    decision = best_and_worst(list(verdicts(replies, wins)), replies)
    assert (decision and decision[:2]) == expected


def test_best_and_worst_agrees_with_its_definition():
    """Over all outcomes of three comparisons of three replies."""
    for outcome in itertools.product([0, 1, None], repeat=3):
        said = [Verdict(each) for each in outcome]
        decided = [(p[v], p[1 - v]) for p, v in zip(((0, 1), (0, 2), (1, 2)), outcome, strict=True) if v is not None]
        net = [sum(w == n for w, _ in decided) - sum(x == n for _, x in decided) for n in range(3)]
        decision = best_and_worst(said, 3)
        gaps = [net[w] - net[x] for w, x in decided]
        if decision is None:
            assert max(gaps, default=0) <= 0
        else:
            assert decision[:2] == decided[gaps.index(max(gaps))]


@pytest.mark.parametrize("gib", [0, -1.0, float("nan")])
def test_a_limit_of_memory_is_a_positive_number(gib):
    for source in (lambda: Judged(LONGER, max_cache_gib=gib), lambda: SelfSamples(max_cache_gib=gib)):
        with pytest.raises(ValueError, match="`max_cache_gib` is .*; it must be more than 0"):
            source()


class Engine:
    """Stands in for vLLM: replies with the seed, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def replies(self, rows, names, *, seeds, temperature, max_new_tokens):
        self.asked.append((list(names), list(seeds), temperature, max_new_tokens))
        return [Reply([], f" {seed} ", seed % 2 == 0) for seed in seeds]


def test_samples_may_come_from_an_engine_with_the_seeds_that_the_policy_would_use(policy):
    engine = Engine()
    served = SampledElsewhere(*policy, engine)
    model, processor = served
    assert (model, processor) == policy
    drawn = sampled_replies(ROWS, served, replies=2, temperature=0.7, max_new_tokens=9, seed=3, round=1)
    ((names, seeds, temperature, longest),) = engine.asked
    assert names == [f"train row {number}" for number in (0, 0, 1, 1, 2, 2)] and (temperature, longest) == (0.7, 9)
    assert [[reply.text for reply in row] for row in drawn] == [
        [str(seed) for seed in seeds[start : start + 2]] for start in (0, 2, 4)
    ]
    assert len(set(seeds)) == 6
    sampled_replies(ROWS[1:2], served, replies=2, temperature=0.7, max_new_tokens=9, seed=3, round=1)
    assert engine.asked[1][1] == seeds[2:4]


def test_the_best_of_n_replies_is_a_supervised_row_too(policy):
    plain, _ = judged(ROWS, policy, replies=4)
    rows, _ = judged(ROWS, policy, replies=4, best_as_completion=True)
    assert rows == [made and {**made, "completion": made["chosen"]} for made in plain]
    assert check_dataset([made for made in rows if made], "sft").problems == []


def test_one_reply_and_greedy_replies_are_refused():
    with pytest.raises(ValueError, match="`replies` is 1"):
        Judged(LONGER, replies=1)
    with pytest.raises(ValueError, match="every reply would be the same"):
        Judged(LONGER, temperature=0)


def test_self_samples_reject_the_sample_and_drop_copies_of_the_reference(policy):
    source = SelfSamples(max_new_tokens=6, seed=3)
    with generating(policy.model):
        rows = source(ROWS, policy)
        copied = [{**each, "completion": made["rejected"]} for each, made in zip(ROWS, rows, strict=True)]
        assert source(copied, policy) == [None] * 3
    assert source.dropped == {SAME_AS_REFERENCE: 3}
    assert [text(made, "chosen") for made in rows] == [each["completion"][0]["content"] for each in ROWS]
    assert {made["pair_source"] for made in rows} == {"self-samples"}


def test_a_broken_image_names_its_row(policy):
    with pytest.raises(ValueError, match="train row 1, image 0"):
        judged([ROWS[0], {**ROWS[1], "images": [b"broken"]}], policy)


class Rewrites:
    """A chat that says what it is told, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = answers, []

    def __call__(self, requests):
        self.asked += requests
        return [Answer(text) if isinstance(text, str) else text for text in self.answers]


def test_a_corrupted_reply_is_rejected_and_the_reference_chosen():
    chat = Rewrites(
        "Here it is:\n<rewritten> A blue square {x}. </rewritten>",
        "I'm sorry, but I can't do that.",
        Answer(None, "HTTP 500"),
    )
    source = Corrupted(chat)
    first, *rest = source(ROWS)
    assert (text(first, "chosen"), text(first, "rejected")) == ("A red square, 0.", "A blue square {x}.")
    assert first["pair_source"] == "corrupted" and first["images"] is ROWS[0]["images"]
    assert rest == [None, None]
    assert source.dropped == {REFUSED: 1, "HTTP 500": 1}
    asked = chat.asked[0]
    assert asked == Request(asked.text, [], "train row 0")
    assert "What is in the image?" in asked.text and asked.text.endswith("A red square, 0.")
    with_images = Rewrites(*["<rewritten>A.</rewritten>"] * 3)
    Corrupted(with_images, show_images=True)(ROWS)
    assert [len(request.images) for request in with_images.asked] == [1, 0, 2]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<rewritten>A blue cup.</rewritten>", Answer("A blue cup.")),
        ("<rewritten>Two\nlines.</rewritten>", Answer("Two\nlines.")),
        ("A blue cup.", Answer(None, NOT_REWRITTEN)),
        ("<rewritten>A blue cup.", Answer(None, NOT_REWRITTEN)),
        ("<rewritten> </rewritten>", Answer(None, NOT_REWRITTEN)),
        ("<rewritten>A.</rewritten><rewritten>B.</rewritten>", Answer(None, NOT_REWRITTEN)),
        ("<rewritten>A red\n cup.</rewritten>", Answer(None, UNCHANGED)),
        ("<rewritten>Sorry, I cannot help.</rewritten>", Answer(None, REFUSED)),
        ("I am unable to do so.", Answer(None, REFUSED)),
        ("As an AI, I do not lie.", Answer(None, REFUSED)),
        ("<rewritten>I see a sorry dog.</rewritten>", Answer("I see a sorry dog.")),
    ],
)
def test_only_a_changed_reply_between_the_marks_is_taken(answer, expected):
    assert rewritten_reply(Answer(answer), "A red cup.") == expected


def test_a_refusal_is_a_reply_where_the_reference_refuses_too():
    answer = Answer("<rewritten>I cannot see a dog.</rewritten>")
    assert rewritten_reply(answer, "I cannot see a cat.") == Answer("I cannot see a dog.")


def test_a_row_without_a_reference_is_named():
    with pytest.raises(ValueError, match="train row 4: there is no reference reply"):
        Corrupted(Rewrites())([{"row_name": "train row 4", "prompt": []}])


def test_the_prompt_is_ours_and_whole():
    chat = Rewrites("<rewritten>A.</rewritten>")
    Corrupted(chat)([{**ROWS[0], "images": [Image.new("RGB", (4, 4))]}])
    assert not re.search(r"[{}]", chat.asked[0].text)
