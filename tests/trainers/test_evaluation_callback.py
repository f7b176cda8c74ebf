"""Benchmarks during training, with our trainers and TRL's, on one process and several."""

import json

import pytest
import trl
from peft import LoraConfig

from tests.distributed import launch
from tests.evaluation.helpers import mmhal_folder, objects_folder, pope_folder
from tests.families import load_processor, saved
from tests.trainers.dpo.helpers import logs, make, rows
from trl_vlm import DPOConfig, DPOTrainer, EvaluationCallback
from trl_vlm.evaluation import BENCHMARKS, RunSettings, Subject, run_benchmarks
from trl_vlm.judges.chat import Answer

OURS, TRLS = (DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)
POPE, CHAIR, MMHAL = (BENCHMARKS[name] for name in ("pope", "chair", "mmhal"))
SHORT = {"max_steps": 4, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return mmhal_folder(objects_folder(pope_folder(tmp_path_factory.mktemp("data"))))


def evaluated(kind, folder, data, benchmarks=(POPE,), **options):
    settings = {"every_steps": 2, "max_new_tokens": 5, **options}
    trainer = make(*kind, folder, **SHORT)
    trainer.add_callback(EvaluationCallback(trainer, benchmarks, data, **settings))
    return trainer


@pytest.mark.parametrize("kind", [OURS, TRLS], ids=["ours", "trl"])
def test_numbers_are_logged_before_training_and_every_few_steps_and_training_stays_as_it_was(kind, tmp_path, data):
    plain = logs(make(*kind, tmp_path, **SHORT))
    trainer = evaluated(kind, tmp_path, data)
    assert logs(trainer) == plain
    entries = [entry for entry in trainer.state.log_history if "eval/pope_f1" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert entries[0]["eval/pope_questions"] == 12 and "eval/pope_mean_accuracy" in entries[0]
    assert trainer.model.training


def test_the_callback_and_the_command_report_the_same_numbers(tmp_path, data):
    trainer = evaluated(TRLS, tmp_path, data, [POPE, CHAIR])
    settings = RunSettings(data, tmp_path / "run", max_new_tokens=5, progress=False)
    results = run_benchmarks([Subject("m", str(saved("llava", sharp=4.0)))], [POPE, CHAIR], settings)
    measured = EvaluationCallback(trainer, [POPE, CHAIR], data, every_steps=1, max_new_tokens=5).evaluate()
    finite = {
        f"eval/{task}_{name}": value
        for task, result in zip(("pope", "chair"), results, strict=True)
        for name, value in result.metrics.items()
        if value == value and "published" not in name
    }
    assert measured == finite and len(measured) > 20


def test_an_adapter_is_measured_with_its_adapter(tmp_path, data):
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make(*OURS, tmp_path, peft_config=lora, **SHORT)
    callback = EvaluationCallback(trainer, [POPE], data, every_steps=1, max_new_tokens=5)
    adapted = [record.reply for record in callback._records(callback.tasks[0])]
    with trainer.model.disable_adapter():
        base = [record.reply for record in callback._records(callback.tasks[0])]
    assert adapted != base


def test_a_part_is_asked_and_a_judge_can_be_given(tmp_path, data):
    asked = []

    def judge(requests):
        asked.extend(requests)
        return [Answer("Rating: 2") for _ in requests]

    trainer = make(*TRLS, tmp_path, **SHORT)
    callback = EvaluationCallback(trainer, [MMHAL], data, every_steps=1, limit=3, max_new_tokens=5, judge=judge)
    measured = callback.evaluate()
    assert len(asked) == 3
    assert measured["eval/mmhal_score"] == 2 and measured["eval/mmhal_hallucination_rate"] == 1


def test_plain_supervised_training_is_measured(tmp_path, data):
    columns = rows((1, 1)).remove_columns("rejected").rename_column("chosen", "completion")
    model = saved("llava", sharp=4.0)
    args = trl.SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=1, use_cpu=True, bf16=False,
                         max_length=None, report_to="none", save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = trl.SFTTrainer(str(model), args=args, train_dataset=columns, processing_class=load_processor(model))
    trainer.add_callback(EvaluationCallback(trainer, [POPE], data, every_steps=2, limit=4, max_new_tokens=4))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval/pope_accuracy" in entry] == [0, 2]


def test_what_cannot_be_measured_is_refused_before_training(tmp_path, data):
    trainer = make(*TRLS, tmp_path, **SHORT)
    with pytest.raises(ValueError, match="`every_steps` is 0"):
        EvaluationCallback(trainer, [POPE], data, every_steps=0)
    with pytest.raises(ValueError, match="mmhal need a judge"):
        EvaluationCallback(trainer, [MMHAL], data, every_steps=1)
    with pytest.raises(ValueError, match="pope: there is no coco_pope_"):
        EvaluationCallback(trainer, [POPE], tmp_path, every_steps=1)
    trainer.processing_class = trainer.processing_class.tokenizer
    with pytest.raises(TypeError, match="the trainer needs the model's processor"):
        EvaluationCallback(trainer, [POPE], data, every_steps=1)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_two_processes_give_the_replies_of_one(kind, tmp_path, data):
    script = "tests/trainers/evaluation_distributed_main.py"
    model = str(saved("llava", sharp=4.0))
    alone = make(*TRLS, tmp_path, **SHORT)
    callback = EvaluationCallback(alone, [POPE], data, every_steps=1, limit=5, batch_size=1, max_new_tokens=4)
    expected = [record.reply for record in callback._records(callback.tasks[0])]
    report = launch(script, kind, processes=2, folder=tmp_path / kind, model=model, data=str(data))
    assert report["replies"] == expected and report["steps"] == [0, 1], json.dumps(report)
