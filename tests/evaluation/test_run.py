import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from tests.distributed import ROOT
from tests.evaluation.helpers import mmhal_folder, objects_folder, pope_folder, write_lines
from tests.families import saved
from trl_vlm.evaluation import generate_replies
from trl_vlm.evaluation.benchmarks import BENCHMARKS
from trl_vlm.evaluation.ledger import Ledger
from trl_vlm.evaluation.run import JudgeSource, RunSettings, run_benchmarks
from trl_vlm.evaluation.subjects import Subject
from trl_vlm.evaluation.tasks import part_of, read_tasks
from trl_vlm.judges.chat import CUT_OFF, Answer
from trl_vlm.models.generation import load_policy
from trl_vlm.models.loading import load_generative_model

pytestmark = pytest.mark.slow

POPE, CHAIR, MMHAL = (BENCHMARKS[name] for name in ("pope", "chair", "mmhal"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return mmhal_folder(objects_folder(pope_folder(folder)))


@pytest.fixture(scope="module")
def model():
    return Subject("tiny", str(saved("llava", sharp=4.0)))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter whose base lies on disk."""
    folder = tmp_path_factory.mktemp("adapter")
    base = load_generative_model(saved("llava", sharp=4.0))
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return Subject("adapter", str(folder))


class ScriptedChat:
    """Answers by what the reply's question number says, and counts."""

    name = "scripted"

    def __init__(self, answer="Fine.\nRating: 4"):
        self.answer, self.asked = answer, []

    def __call__(self, requests):
        self.asked += [request.name for request in requests]
        return [Answer(self.answer) if self.answer else Answer(None, CUT_OFF) for _ in requests]


def settings(data, output, **more):
    return RunSettings(
        **{"data": data, "output": output, "max_new_tokens": 5, "batch_size": 3, "progress": False, **more}
    )


def records(output, subject="tiny", task="pope-plain"):
    return (output / subject / task / "records.jsonl").read_text()


def records_of(output, task):
    return records(output, task=task).splitlines()


def test_a_run_writes_records_scores_and_tables(data, model, tmp_path):
    results = run_benchmarks([model], [POPE, CHAIR], settings(data, tmp_path))
    assert [(result.task, result.prompt, result.records) for result in results] == [
        ("pope", "plain", 12), ("chair", "detail", 2),
    ]  # fmt: skip
    first = json.loads(records(tmp_path).splitlines()[0])
    assert first["id"] == "random-1" and first["prompt"] == "Is there a dog in the image?"
    assert first["truth"] == {"answer": "yes", "category": "random"} and "tables" not in first
    scores = json.loads((tmp_path / "tiny" / "chair-detail" / "scores.json").read_text())
    assert scores["metrics"]["replies"] == 2 and scores["judge"] is None and "torch" in scores["versions"]
    text = (tmp_path / "results.md").read_text()
    assert "## pope\n\nprompt: plain, 12 items" in text and "| mean F1" in text and "## chair" in text


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batching_sorting_and_padding_change_no_reply(data, model, tmp_path, batch_size):
    run_benchmarks([model], [POPE], settings(data, tmp_path, batch_size=batch_size))
    (task,) = read_tasks([POPE], data)
    rows = [task.row(question) for question in task.questions]
    expected = generate_replies(*load_policy(model.path, "auto"), rows, max_new_tokens=5, batch_size=1, progress=False)
    replies = [json.loads(line)["reply"] for line in records(tmp_path).splitlines()]
    assert replies == expected and len(set(replies)) > 1


class Killed(BaseException):
    """What a kill is to the code that it hits."""


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_killed_run_ends_with_equal_records(data, model, adapter, tmp_path, monkeypatch, place, kind):
    subject = model if kind == "full" else adapter
    whole = tmp_path / "whole"
    run_benchmarks([subject], [POPE], settings(data, whole))
    append, calls = Ledger.append, []

    def dies(self, entries):
        calls.append(1)
        if len(calls) > place:
            with open(self.path, "ab") as file:  # a line that is half on the disk
                file.write(json.dumps(next(iter(entries))).encode()[:20])
            raise Killed
        append(self, entries)

    monkeypatch.setattr(Ledger, "append", dies)
    output = tmp_path / "killed"
    with pytest.raises(Killed):
        run_benchmarks([subject], [POPE], settings(data, output))
    monkeypatch.setattr(Ledger, "append", append)
    run_benchmarks([subject], [POPE], settings(data, output))
    assert records(output, subject.name) == records(whole, subject.name)


def test_a_finished_run_loads_no_model_and_asks_no_judge(data, model, tmp_path, monkeypatch):
    chat = ScriptedChat()
    run = settings(data, tmp_path, judge=JudgeSource("scripted", lambda: chat))
    first = run_benchmarks([model], [MMHAL], run)
    assert len(chat.asked) == 8
    monkeypatch.setattr("trl_vlm.evaluation.run.load_policy", None)
    assert run_benchmarks([model], [MMHAL], run)[0].metrics == first[0].metrics
    assert len(chat.asked) == 8 and first[0].metrics["score"] == 4


def test_memory_is_freed_between_models_and_before_the_judge_and_not_after_the_last(
    data, model, tmp_path, monkeypatch
):
    freed = []
    monkeypatch.setattr("trl_vlm.evaluation.run.gc.collect", lambda: freed.append(1))
    run_benchmarks([model], [POPE], settings(data, tmp_path / "alone"))
    assert len(freed) == 0
    chat = ScriptedChat()
    again = Subject("again", model.path)
    judge = JudgeSource("scripted", lambda: freed.append(1) or chat)
    run_benchmarks([model, again], [MMHAL], settings(data, tmp_path / "two", judge=judge))
    assert len(freed) == 3, "once between the models, and once before the judge, which is made once"


def test_the_adapter_differs_from_its_base_and_is_compared_with_it(data, model, adapter, tmp_path):
    results = run_benchmarks([adapter, model], [POPE], settings(data, tmp_path))
    assert records(tmp_path, "adapter") != records(tmp_path, "tiny")
    assert set(results[0].differences) == {"tiny"} and not results[1].differences
    difference = results[0].differences["tiny"]["accuracy"]
    assert difference.value == pytest.approx(results[0].metrics["accuracy"] - results[1].metrics["accuracy"])
    assert "adapter against tiny" in (tmp_path / "results.md").read_text()
    assert "noise" in (tmp_path / "results.md").read_text()


def test_answers_that_no_judge_gave_are_counted_and_asked_for_again(data, model, tmp_path):
    silent, talking = ScriptedChat(None), ScriptedChat()
    (result,) = run_benchmarks([model], [MMHAL], settings(data, tmp_path, judge=JudgeSource("j", lambda: silent)))
    assert result.metrics["unparsed"] == 1 and result.metrics["score"] != result.metrics["score"]
    line = json.loads(next((tmp_path / "tiny" / "mmhal-plain").glob("j-*/records.jsonl")).open().readline())
    assert line["answer"] is None and line["answer_reason"] == CUT_OFF
    (result,) = run_benchmarks([model], [MMHAL], settings(data, tmp_path, judge=JudgeSource("j", lambda: talking)))
    assert result.metrics["score"] == 4 and len(talking.asked) == 8


def test_results_of_different_judges_share_no_table(data, model, tmp_path):
    for name, points in (("one", 6), ("two", 0)):
        chat = ScriptedChat(f"Rating: {points}")
        run_benchmarks([model], [MMHAL], settings(data, tmp_path, judge=JudgeSource(name, lambda chat=chat: chat)))
    text = (tmp_path / "results.md").read_text()
    assert text.count("## mmhal") == 2 and "judge: one, prompt " in text and "judge: two, prompt " in text
    tables = text.split("## mmhal")[1:]
    assert ["6.00" in table for table in tables] == [True, False]
    kept = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [entry["judge"]["name"] for entry in kept] == ["one", "two"]
    assert all(len(entry["judge"]["template"]) == 12 for entry in kept)


def test_a_judge_that_changes_its_name_is_refused_and_its_answers_are_kept(data, model, tmp_path):
    chat = ScriptedChat()
    chat.served = {"gpt-a", "gpt-b"}
    with pytest.raises(ValueError, match="the judge called itself 'gpt-a' and 'gpt-b'"):
        run_benchmarks([model], [MMHAL], settings(data, tmp_path, judge=JudgeSource("j", lambda: chat)))
    folder = next((tmp_path / "tiny" / "mmhal-plain").glob("j-*"))
    assert len(Ledger(folder, "answers", 0).entries()) == 8


def test_replies_made_elsewhere_give_the_same_results(data, model, tmp_path):
    (expected,) = run_benchmarks([model], [POPE], settings(data, tmp_path / "model"))
    lines = [json.loads(line) for line in records(tmp_path / "model").splitlines()]
    file = write_lines(
        tmp_path / "replies.jsonl", [{"id": each["id"], "reply": each["reply"]} for each in lines[::-1]]
    )
    (result,) = run_benchmarks([Subject("tiny", "", file)], [POPE], settings(data, tmp_path / "file"))
    assert result.metrics == expected.metrics
    replies = [json.loads(line)["reply"] for line in records(tmp_path / "file").splitlines()]
    assert replies == [each["reply"] for each in lines]


def test_published_response_files_without_names_are_in_the_order_of_the_questions(data, tmp_path):
    published = json.loads((data / "mmhal" / "response_template.json").read_text())
    file = tmp_path / "responses.json"
    file.write_text(json.dumps([{**each, "model_answer": f"It is {n}."} for n, each in enumerate(published)]))
    run = settings(data, tmp_path / "out", judge=JudgeSource("scripted", ScriptedChat))
    run_benchmarks([Subject("theirs", "", file)], [MMHAL], run)
    path = next((tmp_path / "out" / "theirs" / "mmhal-plain").glob("scripted-*/records.jsonl"))
    assert [json.loads(line)["reply"] for line in path.open()] == [f"It is {n}." for n in range(8)]


def test_a_part_is_the_same_each_time_and_keeps_the_order(data):
    questions = POPE.read(data)
    part = part_of(questions, 5)
    assert part == part_of(questions, 5) == part_of(part, 5) and len(part) == 5
    names = [question.id for question in questions]
    assert [names.index(question.id) for question in part] == sorted(names.index(question.id) for question in part)


def refused(subjects, benchmarks, run, message):
    with pytest.raises(ValueError, match=message):
        run_benchmarks(subjects, benchmarks, run)


def test_what_is_missing_is_named_before_a_model_is_loaded(data, model, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_vlm.evaluation.run.load_policy", None)
    refused([model], [POPE], settings(tmp_path, tmp_path / "o"), "pope: there is no coco_pope_")
    refused([model], [MMHAL], settings(data, tmp_path / "o"), "mmhal need a judge")
    refused([model], [POPE], settings(data, tmp_path / "o", prompts={"pope": "odd"}), "pope has no prompt form 'odd'")
    refused([model], [POPE], settings(data, tmp_path / "o", prompts={"amber": "x"}), "which are not among")
    refused(
        [model, Subject("x", str(tmp_path / "x"))], [POPE], settings(data, tmp_path / "o"), "there is no folder or"
    )
    refused([model, Subject("x", str(tmp_path))], [POPE], settings(data, tmp_path / "o"), "holds no model")
    few = write_lines(tmp_path / "few.jsonl", [{"id": "random-1", "reply": "Yes"}])
    refused([Subject("few", "", few)], [POPE], settings(data, tmp_path / "o"), "no reply to 11 of 12 questions")
    odd = write_lines(tmp_path / "odd.jsonl", [{"id": "random-1", "said": "Yes"}])
    refused([Subject("odd", "", odd)], [POPE], settings(data, tmp_path / "o"), "record 0 has no reply")
    refused([Subject("no", "", tmp_path / "no.jsonl")], [POPE], settings(data, tmp_path / "o"), "there is no file of")


def test_other_settings_do_not_go_on_with_earlier_replies(data, model, tmp_path):
    run_benchmarks([model], [POPE], settings(data, tmp_path))
    refused([model], [POPE], settings(data, tmp_path, max_new_tokens=9), r"other settings \(max_new_tokens\)")
    refused([model], [POPE], settings(data, tmp_path, limit=3), r"other settings \(questions\)")
    other = Subject("tiny", str(saved("llava", seed=1)))
    refused([other], [POPE], settings(data, tmp_path), "other settings")


@pytest.fixture(scope="module")
def second_adapter(tmp_path_factory, adapter):
    """An adapter whose base on disk is a model that another adapter was merged into."""
    base, folder = tmp_path_factory.mktemp("merged"), tmp_path_factory.mktemp("second")
    policy = load_policy(adapter.path, "auto")
    merged = policy.model.merge_and_unload()
    merged.save_pretrained(base)
    policy.processor.save_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["k_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(load_generative_model(str(base)), config).save_pretrained(folder)
    return Subject("second", str(folder))


@pytest.mark.distributed
def test_models_adapters_and_replies_killed_at_three_random_moments_end_with_equal_records(
    data, model, adapter, second_adapter, tmp_path
):
    run_benchmarks([model], [POPE, CHAIR], settings(data, tmp_path / "said"))
    lines = [
        json.loads(line) for task in ("pope-plain", "chair-detail") for line in records_of(tmp_path / "said", task)
    ]
    elsewhere = write_lines(tmp_path / "elsewhere.jsonl", [{"id": r["id"], "reply": r["reply"]} for r in lines])
    subjects = [model, adapter, second_adapter, Subject("elsewhere", "", elsewhere)]
    tasks = [
        {"name": each.name, "path": each.path, "replies": str(each.replies or ""), "data": str(data)}
        for each in subjects
    ]
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"tasks": tasks, "output": str(tmp_path), "seed": 0}))
    script = ROOT / "tests" / "evaluation" / "killed_main.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(script), str(given)], cwd=ROOT, env=environment, check=True, timeout=600)
    found = set()
    for name, runs in json.loads((tmp_path / "codes.json").read_text()).items():
        *killed, last = runs
        assert all(code == -signal.SIGKILL for run in killed for code in run), f"{name} was killed each time: {runs}"
        assert set(last) == {0}, name
    for subject in subjects:
        folder = tmp_path / subject.name
        for task in ("pope-plain", "chair-detail"):
            whole = records(folder / "alone", subject.name, task)
            assert records(folder / "1", subject.name, task) == whole, f"{subject.name}, {task}"
            assert records(folder / "2", subject.name, task) == whole, f"{subject.name}, {task}, two processes"
            found.add(whole)
    # Replies made elsewhere are those of the full model, but for nobody knowing whether they ended.
    assert len(found) == 8, "the models differ"


@pytest.mark.distributed
def test_two_processes_killed_and_resumed_end_with_the_records_of_one(data, model, tmp_path):
    alone = tmp_path / "alone"
    run_benchmarks([model], [POPE, CHAIR], settings(data, alone, batch_size=1))

    def launched(processes: int, output: Path, kill_after: int) -> int:
        script = ROOT / "tests" / "evaluation" / "distributed_main.py"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        task = [str(script), str(data), str(output), model.path, str(kill_after)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [*launcher, *task], cwd=ROOT, env=environment, capture_output=True, timeout=300
        ).returncode

    output = tmp_path / "two"
    assert launched(2, output, kill_after=2) != 0
    assert launched(2, output, kill_after=-1) == 0
    for task in ("pope-plain", "chair-detail"):
        assert records(output, task=task) == records(alone, task=task)
        assert len(list((output / "tiny" / task).glob("replies.*.jsonl"))) == 2, "both processes made some"
