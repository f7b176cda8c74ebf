"""POVID, LLaVA-Human-Preference-10K and the Fact-RLHF prompts: datasets that hold conversations."""

import pytest

from tests.data.converters.helpers import FACTS, fact_rlhf, gpt, human, llava_preference, povid
from trl_vlm.data.converters import BadRecord, MissingColumns
from trl_vlm.data.converters import fact_rlhf as fact_rlhf_module
from trl_vlm.data.converters import llava_human_preference as llava_module
from trl_vlm.data.converters import povid as povid_module


def said(messages):
    return [(message["role"], message["content"]) for message in messages]


def test_a_povid_record_becomes_a_preference_row():
    row = povid_module.to_row(povid())
    assert row["images"] == ["./data/coco/COCO_train2014_000000000009.jpg"]
    assert said(row["prompt"]) == [("user", "Describe it.")]
    assert said(row["chosen"]) == [("assistant", "A bowl.")]
    assert said(row["rejected"]) == [("assistant", "A bowl and a fork.")]
    assert row["rejected_history_differs"] is False
    assert set(row) == set(povid_module.COLUMNS)


def test_a_multi_turn_povid_record_keeps_the_faithful_history():
    chosen = [human("<image>\nWhat is it?"), gpt("A bowl."), human("Its colour?"), gpt("Red.")]
    rejected = [human("<image>\nWhat is it?"), gpt("A bowl and a fork."), human("Its colour?"), gpt("Blue.")]
    row = povid_module.to_row(povid(chosen, rejected))
    assert said(row["prompt"]) == [("user", "What is it?"), ("assistant", "A bowl."), ("user", "Its colour?")]
    assert (said(row["chosen"]), said(row["rejected"])) == ([("assistant", "Red.")], [("assistant", "Blue.")])
    assert row["rejected_history_differs"] is True


def test_povid_sides_that_ask_different_questions_are_refused():
    with pytest.raises(BadRecord, match="different questions: \\['Describe it.'\\] and \\['Name it.'\\]"):
        povid_module.to_row(povid(rejected=[human("<image>\nName it."), gpt("A fork.")]))


@pytest.mark.parametrize(
    ("conversation", "fault"),
    [
        ([], "conversations holds no turns"),
        ("text", "conversations holds no turns"),
        ([human("Q?")], "does not end on a question and its reply: speakers are \\['user'\\]"),
        ([human("Q?"), gpt("A."), human("And?")], "does not end on a question and its reply"),
        ([human("Q?"), human("Q?"), gpt("A.")], "one speaker twice in a row: turns 0 and 1"),
        ([{"from": "cat", "value": "Miaow."}, gpt("A.")], "unknown speaker: 'cat'"),
        (["Q?", "A."], "turn without a speaker"),
        ([human("Q?"), gpt("A."), human("See <image>?"), gpt("A.")], "turn of conversations mentions <image>"),
        ([human("Q?"), gpt(" ")], "empty turn of conversations"),
        ([human(None), gpt("A.")], "question is not text: got NoneType"),
    ],
)
def test_odd_conversations_are_refused(conversation, fault):
    record = {**povid(), "conversations": conversation}
    with pytest.raises(BadRecord, match=fault):
        povid_module.to_row(record)


@pytest.mark.parametrize(("preference", "chosen"), [(1, "A cat in a hat."), (2, "A grey cat."), ("2", "A grey cat.")])
def test_a_llava_preference_record_joins_its_facts(preference, chosen):
    row = llava_module.to_row(llava_preference(preference=preference), FACTS)
    assert said(row["prompt"]) == [("user", "What is on the bench?")]
    assert said(row["chosen"]) == [("assistant", chosen)]
    assert row["rejected"] != row["chosen"]
    assert row["facts"] == ["A grey cat sleeps on a bench.", "A cat outside."]
    assert row["hallucination"] is True
    assert set(row) == set(llava_module.COLUMNS)
    messages = row["prompt"] + row["chosen"] + row["rejected"]
    assert not any(fact in message["content"] for fact in row["facts"] for message in messages)


def test_a_multi_turn_llava_preference_record_keeps_its_history():
    conversation = [human("<image>\nWhat is it?"), gpt("A bench."), human("And on it?"), gpt("stand-in")]
    row = llava_module.to_row(llava_preference(conversation), FACTS)
    assert said(row["prompt"]) == [("user", "What is it?"), ("assistant", "A bench."), ("user", "And on it?")]


def test_without_a_facts_file_a_preference_row_has_no_facts():
    assert "facts" not in llava_module.to_row(llava_preference())


@pytest.mark.parametrize(
    ("changes", "facts", "fault"),
    [
        ({"preference": 0}, FACTS, "preference is neither 1 nor 2: got 0"),
        ({"preference": None}, FACTS, "preference is neither 1 nor 2"),
        ({"output_1": {"from": "gpt"}}, FACTS, "output_1 has no value"),
        ({"output_1": gpt("A grey cat.")}, FACTS, "chosen and rejected are the same"),
        ({"image": None}, FACTS, "missing image"),
        ({}, {}, "no facts for the image: the facts file has no key '000000111111.jpg'"),
        ({}, {"000000111111.jpg": "A cat."}, "facts are not a list"),
        ({}, {"000000111111.jpg": [""]}, "empty fact"),
    ],
)
def test_odd_llava_preference_records_are_refused(changes, facts, fault):
    with pytest.raises(BadRecord, match=fault):
        llava_module.to_row(llava_preference(**changes), facts)


def test_a_fact_rlhf_record_becomes_a_prompt_row_on_its_first_question():
    row = fact_rlhf_module.to_row(fact_rlhf(), FACTS)
    assert row == {
        "images": ["000000222222.jpg"],
        "prompt": [{"role": "user", "content": "What runs on rails?\nA. bus\nB. tram"}],
        "facts": ["Trams run on rails."],
        "answer": "B",
        "length_weight": -0.5,
        "id": "000000222222",
    }


# Source: the enumeration of caption types in spec 1.7.
@pytest.mark.parametrize(
    ("caption_type", "answer", "facts"),
    [
        (1, None, ["A bus beside a tram."]),
        (2, "A", ["Trams run on rails."]),
        (5, "D", ["Trams run on rails."]),
        (6, "no", ["A bus beside a tram."]),
        (7, "yes", ["A bus beside a tram."]),
    ],
)
def test_the_caption_type_gives_the_answer_and_the_kind_of_facts(caption_type, answer, facts):
    row = fact_rlhf_module.to_row(fact_rlhf(caption_type=caption_type), FACTS)
    assert (row["answer"], row["facts"]) == (answer, facts)


def test_absent_fields_of_a_fact_rlhf_record_have_their_published_defaults():
    record = fact_rlhf()
    del record["caption_type"], record["length_bonus"], record["captions"]
    row = fact_rlhf_module.to_row(record)
    assert (row["answer"], row["length_weight"], row["facts"]) == (None, 1.0, [])


def test_without_a_facts_file_the_captions_of_a_prompt_row_are_its_facts():
    assert fact_rlhf_module.to_row(fact_rlhf())["facts"] == ["A bus.", "A red bus on a street."]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"caption_type": 8}, "unknown caption_type: 8"),
        ({"caption_type": "general"}, "caption_type is not an integer: got 'general'"),
        ({"length_bonus": float("nan")}, "length_bonus is not a finite number"),
        ({"length_bonus": "long"}, "length_bonus is not a finite number"),
        ({"conversations": [gpt("A.")]}, "conversations holds no question"),
        ({"image": ""}, "missing image"),
        ({"image": "unknown.jpg"}, "no facts for the image: the facts file has no key 'aok_unknown.jpg'"),
    ],
)
def test_odd_fact_rlhf_records_are_refused(changes, fault):
    with pytest.raises(BadRecord, match=fault):
        fact_rlhf_module.to_row(fact_rlhf(**changes), FACTS)


@pytest.mark.parametrize("module", [povid_module, llava_module, fact_rlhf_module])
def test_another_schema_names_the_columns_found(module):
    with pytest.raises(
        MissingColumns, match=r"Found the columns \['id', 'text'\]; needed are \['image', 'conversations'"
    ):
        module.to_row({"id": 1, "text": ""})
