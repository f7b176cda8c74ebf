import json
from collections import Counter

import pytest

from trl_vlm.data.facts import JudgeTemplate, facts_block, judge_messages, shuffled_facts

PROMPT = [{"role": "user", "content": "What is on the table?"}]
REPLY = [{"role": "assistant", "content": "A cup."}]
FACTS = ["a red cup", "a wooden table"]
SHORT = JudgeTemplate("judge . {facts}", "facts : {bullets} .", bullet="{fact}", separator=" ; ", opening="it is")


def test_a_judge_turn_follows_the_reply_and_ends_with_the_unfinished_opening():
    messages = judge_messages(PROMPT, REPLY, FACTS, SHORT)
    assert messages == [
        *PROMPT,
        *REPLY,
        {"role": "user", "content": "judge . facts : a red cup ; a wooden table ."},
        {"role": "assistant", "content": "it is"},
    ]


def test_the_default_template_shows_one_bullet_per_fact_and_names_the_four_qualities():
    *_, request, opening = judge_messages(PROMPT, REPLY, FACTS, JudgeTemplate())
    assert "\n- a red cup\n- a wooden table\n" in request["content"]
    for quality in ("accuracy", "helpful", "natural language", "concision"):
        assert quality in request["content"].lower()
    assert not opening["content"].endswith((".", " "))


@pytest.mark.parametrize("facts", [None, []])
def test_a_row_without_facts_has_no_lead_in(facts):
    request = judge_messages(PROMPT, REPLY, facts, JudgeTemplate())[2]["content"]
    assert "known to be true" not in request and "{" not in request and "anything?\n2." in request
    assert facts_block(facts, JudgeTemplate()) == ""


def test_facts_can_be_left_out_of_a_template():
    template = JudgeTemplate().without_facts()
    assert judge_messages(PROMPT, REPLY, FACTS, template) == judge_messages(PROMPT, REPLY, None, JudgeTemplate())


def test_no_template_leaves_the_conversation_as_it_is():
    assert judge_messages(PROMPT, REPLY, FACTS, JudgeTemplate.none()) == [*PROMPT, *REPLY]


def test_a_template_without_an_opening_ends_with_the_request():
    template = JudgeTemplate("{facts}", "facts : {bullets}", opening="")
    assert judge_messages(PROMPT, REPLY, FACTS, template)[-1]["role"] == "user"
    # A request that is nothing but absent facts is no turn at all.
    assert judge_messages(PROMPT, REPLY, None, template) == [*PROMPT, *REPLY]


def test_facts_with_braces_are_shown_as_they_are():
    assert facts_block(["a {facts} sign", "{bullets}"], SHORT) == "facts : a {facts} sign ; {bullets} ."
    assert "{facts} sign" in judge_messages(PROMPT, REPLY, ["a {facts} sign"], SHORT)[2]["content"]


def test_messages_that_come_in_are_not_changed():
    prompt, reply = [dict(PROMPT[0])], [dict(REPLY[0])]
    judge_messages(prompt, reply, FACTS, SHORT)
    assert (prompt, reply) == (PROMPT, REPLY)


def test_a_saved_template_loads_as_it_was(tmp_path):
    for template in (JudgeTemplate(), SHORT.without_facts(), JudgeTemplate.none()):
        template.save_pretrained(tmp_path / "model")
        assert JudgeTemplate.from_pretrained(tmp_path / "model") == template
        assert JudgeTemplate.from_pretrained(tmp_path / "model" / "judge_template.json") == template


def test_a_missing_or_foreign_template_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no judge template at .*judge_template.json"):
        JudgeTemplate.from_pretrained(tmp_path)
    (tmp_path / "judge_template.json").write_text(json.dumps({"prompt": "?"}))
    with pytest.raises(ValueError, match="is not a judge template"):
        JudgeTemplate.from_pretrained(tmp_path)


def test_templates_that_would_lose_facts_are_refused():
    with pytest.raises(ValueError, match="no {facts}"):
        JudgeTemplate(request="Is it good?")
    with pytest.raises(ValueError, match="must contain {bullets}"):
        JudgeTemplate(facts="these are known:")
    with pytest.raises(ValueError, match="without a `request`"):
        JudgeTemplate(request="", opening="it is", use_facts=False)
    with pytest.raises(ValueError, match="ends with white space"):
        JudgeTemplate(opening="it is ")


def test_shuffling_keeps_the_facts_and_depends_on_the_seed_and_the_facts_alone():
    facts = [f"fact {index}" for index in range(6)]
    assert shuffled_facts(facts, 0) == shuffled_facts(list(facts), 0)
    assert sorted(shuffled_facts(facts, 3)) == facts
    assert shuffled_facts(None, 0) == []
    orders = Counter(tuple(shuffled_facts(["a", "b", "c"], seed)) for seed in range(600))
    assert len(orders) == 6 and min(orders.values()) > 60  # 100 expected of each


FIRST = JudgeTemplate(
    "judge .", "facts : {bullets} . ", bullet="{fact}", separator=" ; ", facts_first=True, opening=""
)


def test_facts_may_stand_before_the_text_of_the_first_user_turn():
    system = {"role": "system", "content": "Be brief."}
    messages = judge_messages([system, *PROMPT], REPLY, FACTS, FIRST)
    assert [message["content"] for message in messages] == [
        "Be brief.",
        "facts : a red cup ; a wooden table . What is on the table?",
        "A cup.",
        "judge .",
    ]
    assert judge_messages(PROMPT, REPLY, FACTS, FIRST.without_facts())[0] == PROMPT[0]
    assert judge_messages(PROMPT, REPLY, [], FIRST)[0] == PROMPT[0]


def test_facts_that_come_first_leave_placeholders_and_their_input_alone():
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    prompt = [{"role": "user", "content": parts}]
    messages = judge_messages(prompt, REPLY, ["a cup"], FIRST)
    assert messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "facts : a cup . What?"}]
    assert prompt == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def test_facts_in_two_places_or_in_none_are_refused():
    with pytest.raises(ValueError, match="shown twice"):
        JudgeTemplate("judge . {facts}", facts_first=True)
    with pytest.raises(ValueError, match="no user turn"):
        judge_messages([], REPLY, FACTS, FIRST)
