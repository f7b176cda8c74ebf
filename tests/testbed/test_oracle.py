from trl_vlm.evaluation.chair import chair
from trl_vlm.testbed.oracle import (
    AttributeCounts,
    ReplyCounts,
    count_attributes,
    count_reply,
    find_objects,
    right_and_wrong,
    truth_reward,
)
from trl_vlm.testbed.sentences import Statement

REPLY = "there is a cup . i see a dog . i see a cup . i see a kite . i see a kite . there is"


def test_objects_are_found_in_order_with_repeats():
    assert find_objects(REPLY) == ["cup", "dog", "cup", "kite", "kite"]
    assert find_objects("i see the image .") == []


def test_counts_of_a_reply_by_hand():
    assert count_reply(REPLY, ["cup", "dog", "tree"]) == ReplyCounts(
        correct=2, hallucinated=1, mentions=5, hallucinated_mentions=2, repeats=2, present=3, sentences=6, words=27
    )


def test_an_empty_reply_says_nothing():
    assert count_reply("", ["cup"]) == ReplyCounts(0, 0, 0, 0, 0, present=1, sentences=0, words=0)


def test_a_noun_of_no_kind_of_the_world_is_a_hallucination():
    assert count_reply("there is a bat .", ["cup"]).hallucinated == 1


def test_counts_agree_with_chair():
    scores = chair([REPLY], [["cup", "dog", "tree"]], find_objects)
    assert scores.chair_i == 2 / 5
    assert scores.chair_i_distinct == 1 / 3
    assert scores.recall == 2 / 3
    assert scores.repeats == 2 / 5
    assert scores.length_words == 27


TRUTH = {
    "cup": Statement("cup", "small", "red", "on the left"),
    "dog": Statement("dog", "large", "blue", "in the middle"),
}
FULL_REPLY = (
    "there is a small blue cup on the left . i see a large blue dog on the right . there is a small . "
    "there is a small red kite on the left . there is a dog ."
)


def test_attributes_by_hand():
    # Told of what is there: three of the cup, three of the dog, and of the second dog nothing.
    assert count_attributes(FULL_REPLY, TRUTH) == AttributeCounts(told=6, wrong=2, broken=1)
    assert count_attributes("", TRUTH) == AttributeCounts(0, 0, 0)


def test_without_attributes_kinds_are_right_or_wrong():
    assert right_and_wrong(REPLY, {kind: Statement(kind) for kind in ("cup", "dog", "tree")}) == (2, 1)


def test_with_attributes_a_statement_of_which_anything_is_wrong_is_untrue():
    # Each of its five sentences is untrue: color, place, nothing named, an absent kind, no attributes.
    assert right_and_wrong(FULL_REPLY, TRUTH) == (0, 5)
    true = "i see a small red cup on the left ."
    assert right_and_wrong(f"{true} {true} there is a large blue dog in the middle . there is a", TRUTH) == (2, 1)


def reward(reply, **columns):
    (value,) = truth_reward([None], [[{"role": "assistant", "content": reply}]], **columns)
    return value


def test_what_the_judge_that_knows_the_truth_gives_by_hand():
    assert reward(REPLY, objects=[["cup", "dog", "tree"]]) == 2 - 2 * 1 - 0.5 * 2
    phrases = [statement.phrase for statement in TRUTH.values()]
    assert phrases == ["small red cup on the left", "large blue dog in the middle"]
    # Each of its six sentences is untrue; the cup and the dog are named twice.
    found = reward(
        f"there is a small red cup on the right . {FULL_REPLY}", objects=[["cup", "dog"]], statements=[phrases]
    )
    assert found == 0 - 2 * 6 - 0.5 * 2
    assert reward("i see a small red cup on the left .", objects=[["cup", "dog"]], statements=[phrases]) == 1
    assert reward("i see a large red cup on the left .", objects=[["cup", "dog"]], statements=[phrases]) == -2
