"""What a person sees of a run: headings, and a line for each logged step instead of dictionaries."""

import logging

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState, TrainingArguments

from trl_vlm.scripts.console import COLUMNS, ReadableProgress, heading, make_readable, readable

PPO_LOGS = {
    "loss": 0.01234,
    "grad_norm": 1.5,
    "learning_rate": 1e-5,
    "num_tokens": 12345.0,
    "completions/mean_length": 17.53,
    "completions/min_length": 3.0,
    "completions/max_length": 48.0,
    "reward": 1.2345,
    "reward_std": 0.4,
    "ppo/kl": 0.031,
    "ppo/score": 2.5,
    "ppo/value_loss": 0.7,
    "epoch": 0.5,
}


def test_a_line_has_the_step_what_matters_first_and_the_time_left():
    line = readable(PPO_LOGS, 8, 96, 190.0)
    assert line.startswith(" 8/96  loss 0.0123  ppo/score 2.5  reward 1.23  ppo/kl 0.031  ppo/value_loss 0.7")
    assert line.endswith("  (3 min left)") and len(line) <= COLUMNS
    assert "learning_rate" not in line and "epoch" not in line and "{" not in line


def test_a_long_log_is_one_line_that_fits():
    logs = {f"eval/some_benchmark_number_{number}": 0.5 for number in range(40)}
    assert len(readable(logs, 1, 10, 5.0)) <= COLUMNS


def test_an_evaluation_shows_its_loss_and_not_its_timings():
    logs = {"eval_runtime": 5.9, "eval_samples_per_second": 12.0, "eval_accuracy": 0.77, "eval_loss": 0.5}
    assert readable(logs, 5, 9) == "5/9  eval_loss 0.5  eval_accuracy 0.77"


def test_the_numbers_of_a_benchmark_share_its_name():
    logs = {"eval/testbed_captions_adv_chair_i": 0.5, "eval/testbed_captions_adv_recall": 0.25}
    assert readable(logs, 24, 96) == "24/96  eval/testbed_captions_adv:  chair_i 0.5  recall 0.25"


def test_the_end_of_a_training_says_how_long_it_took():
    assert readable({"train_runtime": 61.7, "train_loss": 0.3}, 96, 96) == "96/96  trained in 62 s"


def test_numbers_that_are_not_finite_and_texts_do_no_harm():
    assert readable({"loss": float("nan"), "note": "text", "count": 3}, 1, 2) == "1/2  loss nan  count 3"


def test_a_heading_says_which_stage_it_is_and_why(caplog):
    caplog.set_level(logging.INFO)
    heading(2, 4, "reward", "A judge learns. " * 20)
    (text,) = caplog.messages
    first, *others = text.strip().splitlines()
    assert first == "[2/4] reward" and len(others) > 1
    assert all(line.startswith("    A judge") or line.startswith("    ") for line in others)
    assert max(map(len, others)) <= COLUMNS


def test_of_steps_that_follow_fast_few_get_a_line_and_every_evaluation_does(caplog):
    caplog.set_level(logging.INFO)
    shown, state = ReadableProgress(seconds=60), TrainerState(max_steps=9, is_world_process_zero=True)
    for step, logs in enumerate(({"eval/a_b": 0.2}, {"loss": 1.0}, {"loss": 0.5}, {"train_runtime": 3.0}), 1):
        state.global_step = step
        shown.on_log(None, state, None, logs)
    assert caplog.messages == ["1/9  eval/a_b 0.2", "2/9  loss 1", "4/9  trained in 3 s"]


def test_a_trainer_prints_lines_and_no_dictionaries(tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)

    class Model(torch.nn.Linear):
        def forward(self, x, labels):
            return {"loss": (super().forward(x) - labels).square().mean()}

    rows = Dataset.from_dict({"x": [[1.0, 2.0]] * 8, "labels": [[1.0]] * 8}).with_format("torch")
    for disable in (True, False):
        args = TrainingArguments(
            str(tmp_path / str(disable)),
            max_steps=4,
            logging_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=disable,
            save_strategy="no",
        )
        trainer = Trainer(Model(2, 1), args, train_dataset=rows)
        make_readable(trainer, seconds=0)
        kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
        assert not kinds & {PrinterCallback, ProgressCallback}
        caplog.clear()
        trainer.train()
        lines = [text for text in caplog.messages if "/4  " in text]
        assert [line.split()[:2] for line in lines] == [["2/4", "loss"], ["4/4", "loss"], ["4/4", "trained"]]
        shown = capsys.readouterr()
        assert "{" not in shown.out + shown.err and "it/s" not in shown.err
