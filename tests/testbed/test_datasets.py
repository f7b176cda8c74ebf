import pytest

from trl_vlm.testbed.annotator import Annotator
from trl_vlm.testbed.datasets import (
    correction_rows,
    preference_rows,
    prompt_rows,
    question_rows,
    supervised_example,
    supervised_rows,
    worth,
)
from trl_vlm.testbed.oracle import count_reply, find_objects, right_and_wrong
from trl_vlm.testbed.sentences import read_phrase
from trl_vlm.testbed.world import REQUEST, Scene, SceneObject, World, weaken_vision


def content(row, column):
    return row[column][-1]["content"]


def pixels(row):
    return row["images"][0].tobytes()


def scripted(images, seed):
    """Replies that differ with the seed: one names a bat, which no picture shows in world 0, one an anchor."""
    return [f"there is a {('bat', 'book')[(seed + index) % 2]} ." for index in range(len(images))]


def test_supervised_rows_are_a_caption_and_a_question_for_each_picture(world):
    rows = supervised_rows(world, 8, seed=0)
    assert rows.column_names == ["images", "prompt", "completion"]
    assert len(rows) == 8
    for caption, question in zip(list(rows)[::2], list(rows)[1::2], strict=True):
        assert pixels(caption) == pixels(question)
        assert content(caption, "prompt").endswith(REQUEST)
        assert content(question, "completion") in ("yes", "no")


def test_one_seed_gives_the_same_rows_and_another_others(world):
    first, again, other = (prompt_rows(world, 6, seed=seed) for seed in (1, 1, 2))
    assert [pixels(row) for row in first] == [pixels(row) for row in again]
    assert first["facts"] == again["facts"]
    assert [pixels(row) for row in first] != [pixels(row) for row in other]


def test_supervised_examples_with_facts_are_exact_and_show_them_in_the_first_request(world):
    examples = [supervised_example(world, 0, index, biased=True) for index in range(200)]
    told = [example for example in examples if example.facts]
    assert len(told) / len(examples) == pytest.approx(0.25, abs=0.12)
    for example in told:
        assert sorted(example.facts) == sorted(example.picture.scene.kinds)
        assert sorted(find_objects(example.caption)) == sorted(example.facts)
        opening = f"facts : {' '.join(example.facts)} . "
        assert example.caption_conversation[0]["content"] == opening + REQUEST
        first, *others = [turn["content"] for turn in example.question_conversation if turn["role"] == "user"]
        assert first.startswith(opening + "is there a")
        assert len(others) == 5 and not any("facts" in text for text in others)
    untold = [example for example in examples if not example.facts]
    assert any(count_reply(example.caption, example.picture.scene.kinds).hallucinated for example in untold)


def test_prompts_hold_neither_facts_nor_objects(world):
    rows = prompt_rows(world, 20, seed=0)
    assert rows.column_names == ["images", "prompt", "facts", "objects"]
    assert all(row["prompt"] == [{"role": "user", "content": REQUEST}] for row in rows)
    assert all(sorted(row["facts"]) == sorted(row["objects"]) for row in rows)


def test_questions_have_true_answers_and_say_which_are_adversarial(world):
    rows = question_rows(world, 120, seed=0)
    for row in rows:
        kind = content(row, "prompt").split()[-1]
        assert (row["answer"] == "yes") == (kind in row["objects"])
        assert row["adversarial"] == (kind not in row["objects"] and world.anchor_of.get(kind) in row["objects"])
    assert sum(row["answer"] == "yes" for row in rows) == pytest.approx(60, abs=22)
    assert any(row["adversarial"] for row in rows)


def test_a_labeller_without_noise_prefers_the_better_reply(world):
    rows = preference_rows(world, 12, 0, scripted, label_noise=0.0)
    assert len(rows) == 12
    assert rows.column_names == ["images", "prompt", "chosen", "rejected", "facts", "objects"]
    for row in rows:
        right = "book" if "book" in row["objects"] else None
        if right:
            assert content(row, "chosen") == "there is a book ."


def test_what_a_reply_is_worth_by_hand():
    scene = Scene((SceneObject("cup", 0, 1.0), SceneObject("dog", 1, 1.0)))
    assert worth("there is a cup . i see a kite .", scene) == 1 - 2 + 0.5 * 2
    assert worth("", scene) == 0


def test_what_a_reply_is_worth_with_attributes_by_hand():
    cup, dog = SceneObject("cup", 0, 1.0, "small", "red"), SceneObject("dog", 1, 1.0, "large", "blue")
    reply = "there is a small red cup on the left . i see a large red dog in the middle ."
    assert worth(reply, Scene((cup, dog))) == 1 - 2 + 0.5 * 2
    assert worth(reply, Scene((cup, dog._replace(color="red")))) == 2 + 0.5 * 2


def test_a_labeller_ranks_by_attributes_where_sentences_have_them():
    world = World(attributes=True)

    def sample(images, seed):
        """By turns a true statement of each picture, and the same with another size."""
        pictures = world.pictures(len(images), 3, "balanced")
        said = [next(iter(picture.scene.statements.values())) for picture in pictures]
        others = [each._replace(size={"small": "large", "large": "small"}[each.size]) for each in said]
        pairs = enumerate(zip(said, others, strict=True))
        return [f"there is a {pair[(seed + place) % 2].phrase} ." for place, pair in pairs]

    rows = preference_rows(world, 12, 3, sample, label_noise=0.0)
    truths = [picture.scene.statements for picture in world.pictures(12, 3, "balanced")]
    for row, truth in zip(rows, truths, strict=True):
        assert right_and_wrong(content(row, "chosen"), truth) == (1, 0)
        assert right_and_wrong(content(row, "rejected"), truth) == (0, 1)


def test_prompts_of_a_world_with_attributes_come_with_true_phrases(world):
    rows = prompt_rows(World(attributes=True), 6, seed=0)
    assert rows.column_names == ["images", "prompt", "facts", "objects", "statements"]
    for row in rows:
        assert [read_phrase(phrase).kind for phrase in row["statements"]] == row["objects"]
        assert all(len(phrase.split()) == 6 for phrase in row["statements"])
    plain = prompt_rows(world, 6, seed=0)
    assert plain.column_names == ["images", "prompt", "facts", "objects"]


def test_replies_that_are_always_the_same_are_an_error(world):
    with pytest.raises(ValueError, match="0 of 3 preference rows"):
        preference_rows(world, 3, 0, lambda images, seed: ["there is a cup ."] * len(images))


def test_weak_vision_changes_the_pictures_and_nothing_else(world):
    sharp = preference_rows(world, 4, 0, scripted)
    weak = preference_rows(world, 4, 0, scripted, vision_noise=0.4)
    assert sharp["chosen"] == weak["chosen"]
    for one, other in zip(sharp, weak, strict=True):
        assert weaken_vision(one["images"][0], 0.4).tobytes() == pixels(other)


def test_corrected_replies_name_no_absent_object_and_differ_from_the_models_own(world):
    rows = correction_rows(world, 12, 0, scripted)
    assert rows.column_names == ["images", "prompt", "chosen", "rejected", "objects"]
    for row in rows:
        assert content(row, "rejected") in ("there is a bat .", "there is a book .")
        assert count_reply(content(row, "rejected"), row["objects"]).hallucinated == 1
        chosen = count_reply(content(row, "chosen"), row["objects"])
        assert (chosen.hallucinated, chosen.correct, chosen.sentences) == (0, 1, 1)


def test_an_annotators_rows_have_spans_and_otherwise_the_same_columns(world):
    plain = correction_rows(world, 12, 0, scripted)
    marked = correction_rows(world, 12, 0, scripted, annotator=Annotator(noticed=1))
    assert marked.column_names == [*plain.column_names, "chosen_spans", "rejected_spans"]
    # Each scripted reply has one sentence: who notices one error notices all.
    assert marked["chosen"] == plain["chosen"] and marked["rejected"] == plain["rejected"]
    for row in marked:
        for column in ("chosen", "rejected"):
            ((start, end),) = row[f"{column}_spans"]
            assert content(row, column)[start:end] == content(row, column).split()[-2]


def test_examples_with_hidden_cells_come_as_often_as_stated_and_change_no_others(world):
    plain = [supervised_example(world, 0, index, biased=True) for index in range(400)]
    mixed = [supervised_example(world, 0, index, biased=True, hidden_share=0.3) for index in range(400)]
    hidden = [example for example in mixed if example.hidden]
    assert len(hidden) / 400 == pytest.approx(0.3, abs=0.09)
    assert sum(len(example.hidden) == 9 for example in hidden) / len(hidden) == pytest.approx(0.5, abs=0.18)
    assert not any(example.facts for example in hidden)
    assert [one for one, other in zip(plain, mixed, strict=True) if not other.hidden] == [
        example for example in mixed if not example.hidden
    ]


def test_hidden_pictures_have_the_usual_partners_in_the_exact_part_too(world):
    examples = [supervised_example(world, 0, index, biased=False, hidden_share=0.5) for index in range(400)]
    for is_hidden, expected in ((True, 0.85), (False, 0.5)):
        scenes = [example.picture.scene.kinds for example in examples if bool(example.hidden) == is_hidden]
        partners = [world.partner_of[kind] in kinds for kinds in scenes for kind in kinds if kind in world.anchors]
        assert sum(partners) / len(partners) == pytest.approx(expected, abs=0.1)


def test_a_model_that_never_errs_has_nothing_to_correct(world):
    with pytest.raises(ValueError, match="0 of 1 correction rows"):
        correction_rows(world, 1, 0, lambda images, seed: [""] * len(images))
