import argparse
import json
import shutil
from pathlib import Path

import datasets
import pytest
from peft import LoraConfig, get_peft_model

from tests.families import image, saved
from trl_vlm.cli import main as cli
from trl_vlm.evaluation import generate_replies
from trl_vlm.evaluation.lmms_eval import manifest, read_lmms_results
from trl_vlm.models.generation import load_policy
from trl_vlm.models.loading import load_generative_model

# As lmms-eval 0.7.3 wrote it of a LoRA folder on a task of six documents; configurations and hashes are left out.
RECORDED = Path(__file__).with_name("lmms_eval_results.json")
UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]
def text(doc, lmms_eval_specific_kwargs=None):
    return "<image> " + doc["question"]
def scores(doc, results):
    return {"letters": float(len(results[0]))}
"""
TASK = """
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: FOLDER/test.parquet
task: letters
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  until: ["\\n\\n"]
process_results: !function utils.scores
metric_list:
  - metric: letters
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""


def recorded(folder, date="20261101_000000", **changes):
    data = json.loads(RECORDED.read_text()) | changes
    file = folder / "outputs__lora" / f"{date}_results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))
    return file


def test_results_of_lmms_eval_are_read_with_their_intervals(tmp_path):
    recorded(tmp_path)
    (result,) = read_lmms_results(tmp_path)
    assert (result.model, result.task, result.prompt, result.records) == ("lora", "lmms-eval letters", "lmms-eval", 6)
    assert result.metrics == {"letters": pytest.approx(12.8333, abs=1e-4), "same": 0.0}
    interval = result.intervals["letters"]
    assert (interval.low, interval.high) == (pytest.approx(11.455, abs=1e-3), pytest.approx(14.2115, abs=1e-3))
    assert "same" not in result.intervals, 'its error is "N/A"'


def test_errors_by_clusters_go_before_those_by_items_and_filters_are_named(tmp_path):
    values = {"alias": "gqa", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1}
    values |= {"vqa,none": 0.25, "vqa_stderr,none": 0.01, "vqa_stderr_clustered,none": 0.02, "best,none": True}
    recorded(tmp_path, results={"gqa": values}, **{"n-samples": {}})
    (result,) = read_lmms_results(tmp_path, name="mine")
    assert result.model == "mine" and result.metrics == {"exact_match strict": 0.5, "vqa": 0.25}
    assert result.intervals["vqa"].high == pytest.approx(0.25 + 1.96 * 0.02, abs=1e-4) and result.records == 0


def test_the_newest_results_count_and_pope_is_refused(tmp_path):
    recorded(tmp_path, "20261102_000000", results={"letters": {"letters,none": 2.0}})
    recorded(tmp_path, "20261101_000000", results={"letters": {"letters,none": 1.0}, "gqa": {"em,none": 3.0}})
    found = {result.task: result.metrics for result in read_lmms_results(tmp_path)}
    assert found == {"lmms-eval letters": {"letters": 2.0}, "lmms-eval gqa": {"em": 3.0}}
    file = recorded(tmp_path, results={"pope_full": {"pope_accuracy,none": 0.5}})
    with pytest.raises(ValueError, match="holds lmms-eval pope_full, whose numbers are wrong there"):
        read_lmms_results(file)


@pytest.mark.parametrize("text", ["{", "[]", '{"results": []}', '{"results": {"a": 1}}', '{"results": {"a": [1]}}'])
def test_a_file_of_another_form_is_named(tmp_path, text):
    file = tmp_path / "1_results.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="1_results.json has not the form that lmms-eval writes"):
        read_lmms_results(tmp_path)


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(ValueError, match="Was lmms-eval run with `--output_path`"):
        read_lmms_results(tmp_path)


def test_the_command_puts_them_beside_our_own(tmp_path, capsys):
    recorded(tmp_path / "theirs")
    assert cli.main(["evaluate", "lmms", str(tmp_path / "theirs"), "--output", str(tmp_path / "results")]) == 0
    assert "1 results (lmms-eval letters) added to" in capsys.readouterr().out
    text = (tmp_path / "results" / "results.md").read_text()
    assert (
        "## lmms-eval letters\n\nprompt: lmms-eval, 6 items" in text and "| letters | 12.83 [11.46, 14.21] |" in text
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    base = shutil.copytree(saved("llava", sharp=4.0), folder / "base")
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_generative_model(base), config).save_pretrained(folder / "lora")
    return str(folder / "lora")


@pytest.mark.slow
def test_an_adapter_runs_through_lmms_eval_with_our_generation(adapter, tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is no dependency")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.registry_v2 import ModelRegistryV2
    from lmms_eval.tasks import TaskManager

    rows = [
        {"question": "What is it?" + " Please." * place, "answer": "yes", "image": image(place, 40 + 4 * place)}
        for place in range(5)
    ]
    types = {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    datasets.Dataset.from_list(rows, features=datasets.Features(types)).to_parquet(str(tmp_path / "test.parquet"))
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "letters.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    model = registry.get_model_class("trl_vlm")(adapter, batch_size=2)
    options = argparse.Namespace(output_path=str(tmp_path / "out"), process_with_media=False)
    tasks = TaskManager("ERROR", include_path=str(tmp_path))
    found = simple_evaluate(model=model, tasks=["letters"], task_manager=tasks, bootstrap_iters=0, cli_args=options)

    expected = generate_replies(
        *load_policy(adapter, "auto"),
        [{"prompt": [{"role": "user", "content": row["question"]}], "images": [row["image"]]} for row in rows],
        max_new_tokens=8,
        batch_size=1,
        progress=False,
    )
    said = {sample["doc_id"]: sample["filtered_resps"][0] for sample in found["samples"]["letters"]}
    assert [said[place] for place in range(5)] == expected and len(set(expected)) > 1
    file = tmp_path / "1_results.json"
    file.write_text(json.dumps({"results": found["results"], "n-samples": found["n-samples"]}))
    (result,) = read_lmms_results(file, name="adapter")
    assert result.metrics["letters"] == pytest.approx(sum(map(len, expected)) / 5) and result.records == 5
