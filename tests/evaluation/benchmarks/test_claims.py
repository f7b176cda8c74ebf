"""The benchmark of wrong claims: scripted replies and answers, counted by hand."""

import json

import pytest

from tests.evaluation.helpers import metrics_of, record, write_image, write_lines
from trl_vlm.evaluation import RunSettings, Subject, run_benchmarks
from trl_vlm.evaluation.benchmarks.claims import CLAIMS
from trl_vlm.evaluation.run import JudgeSource
from trl_vlm.judges import Answer

PROMPT = [{"role": "user", "content": "What is there?"}]
REPLIES = ["A cup. A dog. A cat.", "A cup.", "Fog. A cup.", "", "A cup. A dog. A ki"]


@pytest.fixture
def data(tmp_path):
    write_image(tmp_path / "claims" / "images" / "a.png")
    rows = [{"images": ["a.png"], "prompt": PROMPT if number else None} for number in range(5)]
    write_lines(tmp_path / "claims.jsonl", rows)
    return tmp_path


class Knows:
    """A judge that sees cups, and cannot see through fog."""

    def __init__(self):
        self.asked = []

    def __call__(self, requests):
        self.asked += requests
        return [
            Answer(None, "timed out") if "Fog." in r.text else Answer("Yes" if "A cup." in r.text else "no")
            for r in requests
        ]


def answers(*texts):
    return json.dumps(list(texts))


def test_claims_by_hand(data):
    said = [answers("Yes", "no", "No."), answers("yes"), answers(None, "maybe"), None, answers("yes", "no", "yes")]
    metrics = metrics_of(CLAIMS, data, REPLIES, said)
    # All sentences of the last reply: `metrics_of` says that each has come to its end.
    assert metrics["wrong_per_reply"] == 3 / 5
    assert metrics["replies_with_wrong"] == 2 / 4  # of the third reply it is not known
    assert metrics["wrong_share"] == 3 / 7
    assert metrics["undecided"] == 2 / 9
    assert metrics["claims_per_reply"] == 9 / 5 and metrics["empty"] == 1 / 5 and metrics["replies"] == 5
    assert {*metrics} == {metric.key for metric in CLAIMS.metrics}


@pytest.mark.parametrize("said", [None, "", "yes", "[]", '["yes"]', '{"0": "yes"}', "[1, 2, 3]", "[" * 9999])
def test_answers_in_another_form_decide_nothing(data, said):
    metrics = metrics_of(CLAIMS, data, ["A cup. A dog. A cat."] * 5, [said] * 5)
    assert metrics["undecided"] == 1 and metrics["wrong_per_reply"] == 0
    assert metrics["wrong_share"] != metrics["wrong_share"], "NaN, not 0"


def test_an_unfinished_sentence_claims_nothing(data):
    question = CLAIMS.read(data)[0]
    reply = record(question, REPLIES[-1], is_finished=False)
    request = CLAIMS.judging.request(question, reply)
    assert [part.text.split("\n")[5] for part in CLAIMS.judging.parts(request)] == ["A cup.", "A dog."]
    assert CLAIMS.judging.request(question, record(question, "A ki", is_finished=False)) is None


def test_a_judge_is_asked_about_each_claim_with_the_image_and_once_for_all_runs(data, tmp_path):
    file = tmp_path / "theirs.jsonl"
    write_lines(file, [{"task": "claims", "id": str(n), "reply": reply} for n, reply in enumerate(REPLIES)])
    chat = Knows()
    settings = RunSettings(data, tmp_path / "out", judge=JudgeSource("scripted", lambda: chat), progress=False)
    (result,) = run_benchmarks([Subject("theirs", "", file)], [CLAIMS], settings)
    assert len(chat.asked) == 3 + 1 + 2 + 3 and all(len(request.images) == 1 for request in chat.asked)
    assert result.metrics["wrong_per_reply"] == (2 + 0 + 0 + 0 + 2) / 5
    assert result.metrics["undecided"] == 1 / 9 and result.judge.template == CLAIMS.judging.digest
    again = run_benchmarks([Subject("theirs", "", file)], [CLAIMS], settings)
    assert again[0].metrics == result.metrics and len(chat.asked) == 9


def test_a_request_without_a_prompt_is_for_a_description_and_a_row_without_an_image_is_refused(data):
    questions = CLAIMS.read(data)
    assert questions[0].text == "Describe the image in detail." and not questions[0].messages
    assert questions[1].text == "What is there?" and questions[1].messages == PROMPT
    assert questions[0].group == questions[1].group
    write_lines(data / "claims.jsonl", [{"images": [], "prompt": PROMPT}])
    with pytest.raises(ValueError, match="row 0 has no image, so that no claim could be checked"):
        CLAIMS.read(data)
    write_lines(data / "claims.jsonl", [{"images": ["b.png"]}])
    with pytest.raises(ValueError, match="there is no image 'b.png'"):
        CLAIMS.read(data)
