import inspect
import json
import logging

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import BitsAndBytesConfig

from tests.families import FAMILIES, load_processor, saved
from tests.preference_rows import FEATURES, preference_row, preference_rows
from tests.trainers.reward.helpers import (
    IMAGES,
    LLAVA,
    SHORT,
    config,
    llava,
    loss_by_definition,
    losses,
    scores_one_by_one,
    trained,
)
from trl_vlm import RewardTrainer
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.parts import part_of
from trl_vlm.models.reply_ends import with_reply_ends
from trl_vlm.models.reward_model import load_reward_model


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_on_rows_with_none_one_and_two_images(family, kind, tmp_path):
    path, rows = saved(family, sharp=8), preference_rows()
    processor = with_reply_ends(load_processor(path))
    lora = LoraConfig(target_modules="all-linear", r=4) if kind == "lora" else None
    trainer = RewardTrainer(
        str(path),
        config(tmp_path, freeze_vision_tower=True),
        train_dataset=rows,
        judge_template=SHORT,
        peft_config=lora,
    )
    trainer.train()
    # A new head is drawn from the seed, so the model before training can be had again.
    before = scores_one_by_one(load_reward_model(path, head_seed=42), processor, rows)
    assert losses(trainer)[0] == pytest.approx(loss_by_definition(before), abs=1e-5)
    assert losses(trainer)[1] != losses(trainer)[0]
    assert all("lora" not in name for name, _ in trainer.model.named_parameters() if part_of(name) == "vision tower")
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if part_of(name) == "vision tower")

    trainer.save_model()
    reloaded = load_reward_model(tmp_path, for_scoring=True)
    template = JudgeTemplate.from_pretrained(tmp_path)
    after = scores_one_by_one(trainer.model, processor, rows)
    assert_close(scores_one_by_one(reloaded, load_processor(tmp_path), rows, template), after, rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 1e-4


class TestLoss:
    def test_margins_are_subtracted(self, tmp_path):
        margins = [0.5, -1.0, 0.0, 2.0]
        rows = [preference_row(seed, count, margin=margins[seed]) for seed, count in enumerate(IMAGES)]
        trainer = llava(tmp_path, rows=Dataset.from_list(rows, features=FEATURES), max_steps=1)
        before = scores_one_by_one(trainer.model, trainer.processing_class, rows)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(loss_by_definition(before, margins), abs=1e-5)

    def test_both_regularisers_add_their_published_terms(self, tmp_path):
        trainer = llava(tmp_path, max_steps=1, mean_reward_coefficient=0.5, center_rewards_coefficient=0.25)
        before = scores_one_by_one(trainer.model, trainer.processing_class, preference_rows())
        trainer.train()
        sums = before.sum(-1)
        expected = loss_by_definition(before) + 0.5 * sums.mean().abs().item() + 0.25 * sums.square().mean().item()
        assert losses(trainer)[0] == pytest.approx(expected, abs=1e-5)

    def test_a_longer_row_in_the_batch_changes_no_score(self, tmp_path):
        trainer = llava(tmp_path)
        rows = [preference_row(0), preference_row(1, prompt=[{"role": "user", "content": "What is this? " * 40}])]
        batch = trainer.data_collator(rows)
        assert batch["attention_mask"][0].sum() < batch["attention_mask"].shape[1] - 100
        alone = scores_one_by_one(trainer.model, trainer.processing_class, rows)
        together = trainer.model(**batch).logits.reshape(2, 2).T
        assert_close(together, alone, rtol=0, atol=1e-5)


class TestMetrics:
    def test_held_out_metrics_are_over_all_pairs_though_batches_differ_in_size(self, tmp_path):
        held_out = preference_rows([1, 2, 0, 1, 1])  # batches of 2, 2 and 1
        trainer = llava(tmp_path, trainer={"eval_dataset": held_out})
        metrics = trainer.evaluate()
        scores = scores_one_by_one(trainer.model, trainer.processing_class, held_out)
        chosen, rejected = scores.T
        expected = {
            "eval_loss": loss_by_definition(scores),
            "eval_accuracy": (chosen > rejected).float().mean(),
            "eval_margin": (chosen - rejected).mean(),
            "eval_mean_reward": scores.mean(),
            "eval_min_reward": scores.min(),
            "eval_max_reward": scores.max(),
            "eval_reward/std": scores.std(correction=0),
            "eval_reward/q05": scores.quantile(0.05),
            "eval_reward/q50": scores.median() / 2 + scores.flatten().sort().values[5] / 2,
            "eval_reward/q95": scores.quantile(0.95),
        }
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(float(value), abs=1e-5), name
        # A second evaluation holds nothing of the first.
        trainer.evaluate(preference_rows([1]))
        assert trainer.state.log_history[-1]["eval_reward/std"] != pytest.approx(metrics["eval_reward/std"], rel=1e-3)

    def test_training_metrics_are_over_all_pairs_since_the_last_log(self, tmp_path):
        rows = preference_rows([1, 1, 1])
        trainer = llava(
            tmp_path, rows=rows, per_device_train_batch_size=2, logging_steps=2, learning_rate=1e-30, max_steps=2
        )
        scores = scores_one_by_one(trainer.model, trainer.processing_class, rows)
        trainer.train()
        log = trainer.state.log_history[0]  # batches of two pairs and of one
        assert log["margin"] == pytest.approx((scores[:, 0] - scores[:, 1]).mean().item(), abs=1e-5)
        assert log["reward/std"] == pytest.approx(scores.std(correction=0).item(), abs=1e-5)

    def test_compute_metrics_receives_one_row_per_pair(self, tmp_path):
        seen = {}

        def accuracy(prediction):
            seen["predictions"] = prediction.predictions
            return {"mine": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).mean())}

        held_out = preference_rows([1, 0, 1])
        trainer = llava(tmp_path, trainer={"eval_dataset": held_out, "compute_metrics": accuracy})
        metrics = trainer.evaluate()
        scores = scores_one_by_one(trainer.model, trainer.processing_class, held_out)
        assert_close(torch.tensor(seen["predictions"]), scores, rtol=0, atol=1e-5)
        assert metrics["eval_mine"] == pytest.approx(metrics["eval_accuracy"])


class TestParts:
    def test_freezing_keeps_the_vision_tower_and_trains_the_projector(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO, logger="trl_vlm"):
            trainer = llava(tmp_path, freeze_vision_tower=True)
        assert "vision tower" in caplog.text and "projector" in caplog.text
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            if part_of(name) == "vision tower":
                assert torch.equal(parameter, before[name]), name
        assert any(
            part_of(n) == "projector" and not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()
        )

    def test_without_freezing_lora_reaches_the_vision_tower(self, tmp_path):
        trainer = llava(tmp_path, trainer={"peft_config": LoraConfig(target_modules="all-linear", r=4)})
        names = [name for name, p in trainer.model.named_parameters() if "lora" in name and p.requires_grad]
        assert any(part_of(name) == "vision tower" for name in names)

    def test_a_generative_adapter_becomes_one_of_a_reward_model(self, tmp_path):
        lora = LoraConfig(target_modules=["q_proj"], exclude_modules=["o_proj"], task_type="CAUSAL_LM", r=4)
        trainer = llava(tmp_path, freeze_vision_tower=True, trainer={"peft_config": lora})
        assert trainer.model.peft_config["default"].task_type == "SEQ_CLS"
        assert lora.task_type == "CAUSAL_LM" and lora.modules_to_save is None  # the one passed in is not changed
        trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert {part_of(name) for name in trainable} == {"language model", "head"}

    def test_the_head_of_an_adapter_is_saved(self, tmp_path):
        lora = LoraConfig(target_modules=["q_proj"], r=4)
        trainer = llava(tmp_path, learning_rate=0.1, trainer={"peft_config": lora})
        trainer.train()
        trainer.save_model()
        head = load_reward_model(tmp_path, for_scoring=True).get_base_model().score
        in_memory = trainer.model.get_base_model().score
        assert_close(head.modules_to_save["default"].weight, in_memory.modules_to_save["default"].weight)

    @pytest.mark.parametrize("adapter", ["new", "loaded"])
    def test_beside_4bit_weights_the_head_trains_in_float32(self, adapter, tmp_path):
        pytest.importorskip("bitsandbytes")
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = load_reward_model(saved("llava", sharp=8, width=64), head_seed=42, quantization_config=quantization)
        drawn = model.score.weight.detach().clone()
        more = {"processing_class": LLAVA, "judge_template": SHORT}
        lora = LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["score"], task_type="SEQ_CLS")
        if adapter == "new":
            more["peft_config"] = lora
        else:
            model = get_peft_model(model, lora)
        options = {"learning_rate": 1e-5, "max_steps": 1, "lr_scheduler_type": "constant"}
        trainer = RewardTrainer(model, config(tmp_path, **options), train_dataset=preference_rows(), **more)
        head = trainer.model.get_base_model().score.modules_to_save["default"].weight
        assert head.dtype == torch.float32 and head.requires_grad
        assert_close(head.data, drawn, rtol=0, atol=0 if adapter == "new" else 1e-3)
        before = head.detach().clone()
        trainer.train()
        moved = (head - before).abs()
        assert (moved > 0).float().mean() > 0.9  # in bfloat16 a step of 1e-5 leaves the larger weights where they are


class TestSavedFolder:
    def test_resumed_training_ends_where_uninterrupted_training_does(self, tmp_path):
        whole = llava(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
        whole.train()
        resumed = llava(tmp_path / "resumed", max_steps=4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], abs=1e-6)
        for name, parameter in whole.model.named_parameters():
            assert_close(resumed.model.get_parameter(name), parameter, rtol=0, atol=1e-6)

    def test_the_template_travels_with_checkpoints_and_is_found_again(self, tmp_path):
        trainer = llava(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, use_facts=False)
        trainer.train()
        assert JudgeTemplate.from_pretrained(tmp_path / "checkpoint-1") == SHORT.without_facts()
        again = RewardTrainer(
            str(tmp_path / "checkpoint-1"), config(tmp_path / "again"), train_dataset=preference_rows()
        )
        assert again.judge_template == SHORT.without_facts()
        assert json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())["architectures"] == [
            "LlavaForSequenceClassification"
        ]

    def test_the_template_can_be_named_in_the_options(self, tmp_path):
        SHORT.save_pretrained(tmp_path / "words")
        unset = {"judge_template": None}
        assert llava(tmp_path, trainer=unset, judge_template=str(tmp_path / "words")).judge_template == SHORT
        assert llava(tmp_path, trainer=unset, judge_template="none").judge_template == JudgeTemplate.none()
        assert llava(tmp_path, trainer=unset).judge_template == JudgeTemplate()
        with pytest.raises(ValueError, match="`judge_template` came both"):
            llava(tmp_path, judge_template="none")


class TestGuards:
    def test_a_model_that_is_blind_to_its_images_is_not_trained(self, tmp_path):
        def blind(**changes):
            trainer = llava(tmp_path, max_steps=1, **changes)
            for name, parameter in trainer.model.named_parameters():
                if part_of(name) == "projector":
                    parameter.data.zero_()
            return trainer

        with pytest.raises(RuntimeError, match="The scores do not depend on the pixels"):
            blind().train()
        assert losses(trained(blind(check_pixels=False)))
        assert losses(trained(blind(rows=preference_rows([0, 0]))))  # nothing to check without images

    def test_the_check_leaves_the_losses_as_they_are(self, tmp_path):
        checked, unchecked = trained(llava(tmp_path)), trained(llava(tmp_path, check_pixels=False))
        assert losses(checked) == losses(unchecked)

    def test_a_max_length_that_would_cut_a_row_is_an_error_that_names_it(self, tmp_path):
        trainer = llava(tmp_path, max_length=40)
        with pytest.raises(
            ValueError, match=r"train row \d \((chosen|rejected)\): it has \d+ tokens, image tokens incl"
        ):
            trainer.train()

    def test_without_a_max_length_rows_with_images_may_be_long(self, tmp_path):
        assert llava(tmp_path).data_collator.collate.max_length is None

    def test_rows_that_are_too_long_are_dropped_only_if_asked_and_are_counted(self, tmp_path, caplog):
        rows = [preference_row(0), preference_row(1, facts=["a red cat"] * 60), preference_row(2)]
        rows = Dataset.from_list(rows, features=FEATURES)
        trainer = llava(tmp_path, rows=rows, max_length=200, drop_too_long_rows=True)
        assert "Left out 1 of 3 rows of the train dataset" in caplog.text
        assert [row["row_name"] for row in trainer.train_dataset] == ["train row 0", "train row 2"]
        with pytest.raises(ValueError, match="Every row of the train dataset is longer"):
            llava(tmp_path, rows=rows, max_length=20, drop_too_long_rows=True)
        with pytest.raises(ValueError, match="the dataset is streamed"):
            llava(tmp_path, rows=rows.to_iterable_dataset(), max_length=200, drop_too_long_rows=True)
        with pytest.raises(ValueError, match="`drop_too_long_rows` needs a `max_length`"):
            config(tmp_path, drop_too_long_rows=True)

    @pytest.mark.parametrize(
        "rows, message",
        [
            (preference_rows().select([]), "The train dataset is empty"),
            (preference_rows().remove_columns("rejected"), r"lacks the column\(s\) \['rejected'\]"),
            (
                preference_rows(chosen=[{"role": "assistant", "content": ""}]),
                "train row 0, column 'chosen': the reply is",
            ),
        ],
    )
    def test_bad_rows_stop_before_training(self, rows, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            llava(tmp_path, rows=rows)

    @pytest.mark.parametrize(
        "content, message",
        [
            (None, "there is no image file"),
            (b"", "has zero bytes"),
            (b"\x89PNG\r\n\x1a\n", "not an image"),
        ],
    )
    def test_a_bad_image_file_is_named_when_its_batch_is_made(self, content, message, tmp_path):
        path = tmp_path / "image.png"
        if content is not None:
            path.write_bytes(content)
        rows = Dataset.from_list([preference_row(0, images=0), preference_row(1, 0) | {"images": [str(path)]}])
        trainer = llava(tmp_path / "out", rows=rows.cast_column("images", FEATURES["images"]))
        with pytest.raises(ValueError, match=f"train row 1, image 0: .*{message}"):
            trainer.train()


class TestWays:
    def test_a_streamed_dataset_trains_like_a_stored_one(self, tmp_path):
        stored = preference_rows([1, 0, 2, 1])
        streamed = trained(llava(tmp_path, rows=stored.to_iterable_dataset()))
        assert len(losses(streamed)) == 2
        before = scores_one_by_one(load_reward_model(saved("llava", sharp=8), head_seed=42), LLAVA, stored)
        assert losses(streamed)[0] == pytest.approx(loss_by_definition(before), abs=1e-5)

    def test_a_loaded_model_and_its_processor_train_like_its_name(self, tmp_path):
        model = load_reward_model(saved("llava", sharp=8), head_seed=42)
        trainer = RewardTrainer(
            model, config(tmp_path), train_dataset=preference_rows(), processing_class=LLAVA, judge_template=SHORT
        )
        assert losses(trained(trainer)) == losses(trained(llava(tmp_path)))

    def test_the_wrong_kind_of_argument_is_refused_with_the_right_one(self, tmp_path):
        with pytest.raises(TypeError, match="Use `trl_vlm.RewardConfig`"):
            RewardTrainer(str(saved("llava")), trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False))
        with pytest.raises(TypeError, match="Pass the model's processor"):
            llava(tmp_path, trainer={"processing_class": LLAVA.tokenizer})
        with pytest.raises(ValueError, match="`mean_reward_coefficient` is -1"):
            config(tmp_path, mean_reward_coefficient=-1.0)
        with pytest.raises(ValueError, match="must be a Jinja file"):
            llava(tmp_path, chat_template_path="some/folder")

    def test_a_model_made_in_memory_needs_its_processor(self, tmp_path):
        model = load_reward_model(saved("llava", sharp=8))
        model.config._name_or_path = ""
        with pytest.raises(ValueError, match="Pass it as `processing_class`"):
            RewardTrainer(model, config(tmp_path), train_dataset=preference_rows())


def test_trl_still_offers_the_seams_we_stand_on():
    for name, arguments in {
        "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
        "_set_signature_columns_if_needed": ["self"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "save_model": ["self", "output_dir", "_internal_call"],
        "log": ["self", "logs", "start_time"],
    }.items():
        assert list(inspect.signature(getattr(trl.RewardTrainer, name)).parameters) == arguments


def test_use_cache_which_trls_reward_script_passes_is_taken(tmp_path):
    trainer = llava(tmp_path, model_init_kwargs={"use_cache": False}, max_steps=1)
    assert losses(trained(trainer)) == losses(trained(llava(tmp_path, max_steps=1)))
