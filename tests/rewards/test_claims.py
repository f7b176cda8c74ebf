"""Claims of replies whose truth is known: what is counted, and where in a reply the rewards lie."""

import pytest
import trl

from benchmarks.studies import ppo_claims
from tests.families import load_processor
from trl_vlm.rewards import ClaimQuestion, ClaimReward, ClaimVerdict, ReplyClaims, sentence_claims
from trl_vlm.rewards.claims import CheckedReply, Claim, checked_replies, claim_means
from trl_vlm.testbed.claims import OracleClaimChecker
from trl_vlm.testbed.processor import build_tokenizer

ROW = {"prompt": [{"role": "user", "content": "What is there?"}], "images": []}


class Knows:
    """A checker with a list of what is true; it is undecided about claims with a question mark inside."""

    def __init__(self, *true):
        self.true, self.asked = true, []

    def check(self, questions):
        self.asked += [question.text for question in questions]
        return [
            ClaimVerdict(None, "unsure") if "?" in text else ClaimVerdict(text in self.true) for _, text in questions
        ]


def rewards(reward, *replies, ids=None, **columns):
    messages = [[{"role": "assistant", "content": reply}] for reply in replies]
    columns = {"images": [[]] * len(replies), **columns}
    return reward([ROW["prompt"]] * len(replies), messages, completion_ids=ids, **columns)


def test_sentences_are_claims_with_the_place_where_they_end():
    reply = " A cup, 3.5 cm high.  Is it red? No.\n- Two dogs\n***\n"
    ((found, reason),) = sentence_claims([ROW], [reply])
    assert reason == ""
    assert [claim.text for claim in found] == ["A cup, 3.5 cm high.", "No.", "- Two dogs"]
    assert [reply[: claim.end].endswith(claim.text) for claim in found] == [True] * 3
    assert sentence_claims([ROW] * 2, ["", " \n"]) == [ReplyClaims([]), ReplyClaims([])]


def test_wrong_claims_are_counted_exactly():
    reward = ClaimReward(Knows("A cup.", "A dog."))
    assert rewards(reward, "A cup. A dog.", "A cup. A cat. A kite.", "", "A cat. A dog. A cat.") == [0, -2, 0, -2]
    assert rewards(ClaimReward(reward.checker, share=True), "A cup. A cat. A kite. A dog.") == [-0.5]
    both = ClaimReward(reward.checker, right=2.0, wrong=-0.5)
    assert rewards(both, "A cup. A cat. A kite. A dog.") == [3.0]


def test_undecided_claims_count_nowhere_unless_they_have_a_value():
    checker = Knows("A cup.")
    assert rewards(ClaimReward(checker), "A cup. A?b. A cat.", "A?b.", "A cat.") == [-1.0, None, -1.0]
    assert rewards(ClaimReward(checker, share=True), "A cup. A?b. A cat.") == [-0.5]
    valued = ClaimReward(checker, undecided=-0.25, share=True)
    assert rewards(valued, "A cup. A?b. A cat. A?c.", "A?b.") == [-0.375, -0.25]


def unsplit(rows, replies):
    return [
        ReplyClaims([], "no list") if "x" in reply else ReplyClaims([Claim(reply, len(reply))]) for reply in replies
    ]


def test_a_reply_that_could_not_be_split_has_no_reward_unless_undecided_ones_have_a_value():
    assert rewards(ClaimReward(Knows("A cup."), unsplit), "A cup.", "x") == [0.0, None]
    assert rewards(ClaimReward(Knows("A cup."), unsplit, undecided=-0.5), "A cup.", "x") == [0.0, -0.5]


def test_a_claim_is_asked_about_once_for_each_row():
    checker, other = Knows("A cup."), dict(ROW)
    found = checked_replies([ROW, ROW, other], ["A cup. A cat. A cup.", "A cat.", "A cat."], checker)
    assert checker.asked == ["A cup.", "A cat.", "A cat."]
    assert [(reply.wrong, len(reply.claims)) for reply in found] == [(1, 3), (1, 1), (1, 1)]


@pytest.mark.parametrize("part", ["splitter", "checker"])
def test_a_part_that_returns_too_few_results_is_named(part):
    checker, splitter = Knows(), sentence_claims
    if part == "checker":
        checker.check = lambda questions: []
    else:
        splitter = lambda rows, replies: []  # noqa: E731
    with pytest.raises(ValueError, match=f"the {part} .* returned 0 results for 1"):
        checked_replies([ROW], ["A cup."], checker, splitter)


def test_the_checker_sees_the_row_with_its_images_and_every_column():
    seen = []

    class Sees:
        def check(self, questions):
            seen.extend(question.row for question in questions)
            return [ClaimVerdict(True)] * len(questions)

    rewards(
        ClaimReward(Sees()), "A cup.", "A dog.", images=[["a.jpg"], []], objects=[["cup"], []], row_name=["a", "b"]
    )
    assert [row["images"] for row in seen] == [["a.jpg"], []]
    assert [(row["objects"], row["row_name"]) for row in seen] == [(["cup"], "a"), ([], "b")]


def test_counts_are_logged_per_reply():
    logged = {}
    rewards(ClaimReward(Knows("A cup.")), "A cup. A cat.", "A?b. A kite.", log_metric=logged.__setitem__)
    assert logged == {"claims/per_reply": 2, "claims/wrong": 1, "claims/undecided": 0.25, "claims/not_split": 0}
    assert claim_means([])["wrong"] == 0


def test_the_oracle_of_the_testbed_is_a_checker():
    reward = ClaimReward(OracleClaimChecker())
    replies = ["there is a cup . i see a dog .", "there is a kite .", "describe the image .", ""]
    objects = [["cup", "fork"], ["kite"], ["kite"], []]
    assert rewards(reward, *replies, objects=objects) == [-1.0, 0.0, None, 0.0]
    assert isinstance(OracleClaimChecker().check([ClaimQuestion({"objects": []}, "a dog")])[0], ClaimVerdict)


def test_rewards_lie_on_the_last_token_of_each_claim_and_add_up_to_the_sum():
    tokenizer = build_tokenizer()
    reply = "there is a cup . i see a dog . there is a kite"
    ids = [*tokenizer(reply, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    checker = Knows("there is a cup .")
    options = {"right": 1.0, "wrong": -3.0}
    (placed,) = rewards(ClaimReward(checker, at_claim_ends=tokenizer, **options), reply, ids=[ids])
    expected = [0.0] * len(ids)
    expected[4], expected[9], expected[13] = 1.0, -3.0, -3.0
    assert placed == expected and len(ids) == 15
    assert sum(placed) == rewards(ClaimReward(checker, **options), reply)[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_claims_end_where_their_text_ends_whatever_the_tokens_are(family):
    tokenizer = load_processor(family).tokenizer
    reply = "A red square. 猫 on a wall – naïve.\nThere is a dog, 3.5 m tall."
    ids = tokenizer(reply, add_special_tokens=False).input_ids
    (placed,) = rewards(ClaimReward(Knows(), at_claim_ends=tokenizer), reply, ids=[ids])
    places = [place for place, value in enumerate(placed) if value]
    texts = [tokenizer.decode(ids[: place + 1], skip_special_tokens=True) for place in places]
    shorter = [tokenizer.decode(ids[:place], skip_special_tokens=True) for place in places]
    for claim, text, before in zip(sentence_claims([ROW], [reply])[0].claims, texts, shorter, strict=True):
        assert len(text) >= claim.end > len(before.rstrip("\ufffd"))


def test_where_a_reply_is_not_split_or_empty_the_rewards_still_have_a_place_for_each_token():
    tokenizer = build_tokenizer()
    ids = tokenizer("there is a cup", add_special_tokens=False).input_ids
    empty = rewards(ClaimReward(Knows(), at_claim_ends=tokenizer), "", "", ids=[[], [tokenizer.eos_token_id]])
    assert empty == [[], [0.0]]

    def fails(rows, replies):
        return [ReplyClaims([], "no list")]

    broken = ClaimReward(Knows(), fails, undecided=-0.5, at_claim_ends=tokenizer)
    assert rewards(broken, "there is a cup", ids=[ids]) == [[0.0, 0.0, 0.0, -0.5]]


def test_a_reply_that_is_not_the_text_of_its_tokens_is_an_error_that_names_the_row():
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match="row 0: the reply 'a dog .' is not the text of its 1 tokens"):
        rewards(ClaimReward(Knows(), at_claim_ends=tokenizer), "a dog .", ids=[[tokenizer.eos_token_id]])
    with pytest.raises(ValueError, match="`claims` counts tokens and got no `completion_ids`"):
        rewards(ClaimReward(Knows(), at_claim_ends=tokenizer), "a dog .")


def test_the_counts_of_a_reply():
    verdicts = [ClaimVerdict(True), ClaimVerdict(False), ClaimVerdict(None, "unsure"), ClaimVerdict(False)]
    reply = CheckedReply([Claim(str(n), n) for n in range(4)], verdicts)
    assert (reply.wrong, reply.undecided) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_trls_own_trainers_take_the_reward_and_its_counts(method, tmp_path):
    processor = ppo_claims.build_processor()
    args = getattr(trl, f"{method}Config")(
        str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=3, max_steps=1,
        beta=0.0, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = getattr(trl, f"{method}Trainer")(
        ppo_claims.build_model(processor, 0),
        ClaimReward(ppo_claims.KnowsTheColors(), ppo_claims.split_into_words),
        args,
        train_dataset=ppo_claims.build_rows(4, 4, seed=0),
        processing_class=processor,
    )
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    assert log["rewards/claims/mean"] == pytest.approx(-log["claims/wrong"]) and log["claims/per_reply"] > 0
