"""With nothing of ours set, the losses and metrics are TRL's."""

import math

import pytest
import trl

from tests.families import FAMILIES
from tests.trainers.dpo.helpers import EXACT, SHARED, largest_difference, logs, lora, make, text_rows
from trl_vlm import DPOConfig, DPOTrainer


def compare(tmp_path, family="llava", tolerance=SHARED, **options):
    wanted = logs(make(trl.DPOTrainer, trl.DPOConfig, tmp_path, family, **options))
    ours = {} if tolerance == SHARED else {"share_prefix": False}
    found = logs(make(DPOTrainer, DPOConfig, tmp_path, family, **options, **ours))
    difference, metric = largest_difference(found, wanted)
    assert difference <= tolerance, f"{metric} differs by {difference}"
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_of_full_training_on_images_equal_trl(family, tmp_path):
    found = compare(tmp_path, family)
    assert math.isclose(found[0]["loss"], math.log(2), abs_tol=1e-6)
    assert found[-1]["loss"] < 0.6  # and something was learnt


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_of_lora_on_images_equal_trl(family, tmp_path):
    found = compare(tmp_path, family, peft_config=lora())
    assert math.isclose(found[0]["loss"], math.log(2), abs_tol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_on_text_equal_trl(family, tmp_path):
    compare(tmp_path, family, data=text_rows())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "paligemma"])
def test_without_sharing_the_numbers_are_trls_to_the_last_digit(family, tmp_path):
    compare(tmp_path, family, tolerance=EXACT)


@pytest.mark.slow
def test_lora_on_text_and_without_sharing_equals_trl(tmp_path):
    compare(tmp_path, data=text_rows(), peft_config=lora())
    compare(tmp_path, data=text_rows(), tolerance=EXACT)
    compare(tmp_path, peft_config=lora(), tolerance=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["ipo"]},
        {"loss_type": ["hinge"]},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["apo_zero"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence", "use_weighting": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_steps": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_losses_and_options_equal_trl(options, tmp_path):
    compare(tmp_path, **options)


def test_trls_own_arguments_are_accepted_and_evaluation_equals_trl(tmp_path):
    reports = []
    for trainer in (trl.DPOTrainer, DPOTrainer):
        made = make(trainer, trl.DPOConfig, tmp_path, eval_dataset=text_rows(), data=text_rows(), max_steps=2)
        made.train()
        reports.append({key: value for key, value in made.evaluate().items() if "eval" in key and "second" not in key})
    for key, value in reports[0].items():
        if "runtime" not in key:
            assert reports[1][key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_a_model_that_cannot_share_takes_the_plain_path_and_says_so_once(tmp_path, caplog):
    trainer = make(DPOTrainer, DPOConfig, tmp_path, model_init_kwargs={"attn_implementation": "flex_attention"})
    messages = [record.getMessage() for record in caplog.records if "computed once per reply" in record.getMessage()]
    assert len(messages) == 1
    assert "'flex_attention' is not known to keep the replies apart" in messages[0]
    assert not trainer.data_collator.shares_prefix
