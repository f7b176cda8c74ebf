"""Pairs that a source makes at every step, with the policy that is being trained."""

import pytest
import torch
from peft import PromptTuningConfig
from torch.testing import assert_close

from tests.families import load_processor
from tests.trainers.dpo.helpers import logs, lora, losses, make, rows, text_rows
from tests.trainers.dpo.sources import Greedy, Recorded, message
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.pairs import SelfSamples
from trl_vlm.trainers.dpo.fresh_pairs import check_arguments, made_pairs

pytestmark = pytest.mark.slow

SHORT = {"max_steps": 3, "per_device_train_batch_size": 4}


def instructions(images=(1, 2, 0, 1)):
    """Rows without a rejected reply."""
    data = rows(images)
    return data.rename_column("chosen", "completion").remove_columns("rejected")


def online(tmp_path, source, data=None, **options):
    data = instructions() if data is None else data
    return make(DPOTrainer, DPOConfig, tmp_path, data=data, pair_source=source, **SHORT | options)


class Written:
    """The rejected reply is the row's own, so training is offline DPO; or another column's."""

    def __init__(self, column="rejected", **more):
        self.column, self.more = column, more

    def __call__(self, rows, policy, round=0):
        return [{**row, "rejected": row[self.column], "pair_round": round, **self.more} for row in rows]


@pytest.mark.parametrize("options", [{}, {"peft_config": lora()}, {"dense_preset": "paper"}, {"share_prefix": False}])
def test_a_source_of_the_rows_own_pairs_is_offline_dpo(options, tmp_path):
    wanted = losses(make(DPOTrainer, DPOConfig, tmp_path, data=rows(), **SHORT | options))
    found = losses(online(tmp_path, Written(), data=rows(), **options))
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_rejected_replies_change_as_the_policy_does_and_need_not_be_in_the_rows(tmp_path):
    source = Greedy()
    entries = logs(online(tmp_path, source, max_steps=4, learning_rate=1e-2, dense_preset="paper"))
    assert len(source.seen) == 4
    said = [dict(zip(call["names"], call["replies"], strict=True)) for call in source.seen]
    assert set(said[0]) == {f"train row {number}" for number in range(4)}
    assert any(said[0][name] != said[-1][name] for name in said[0])
    assert all(
        entry["pairs/length"] == sum(map(len, call["replies"])) / 4
        for entry, call in zip(entries, source.seen, strict=True)
    )
    assert entries[0]["pairs/ended"] == 1.0 and entries[0]["pairs/undecided"] == 0.0


def test_the_policy_generates_in_evaluation_mode_with_adapters_and_cache_and_everything_is_restored(tmp_path):
    found = {}

    def source(rows, policy, round=0):
        model = policy.model
        found["policy"] = (model.training, model.config.get_text_config().use_cache, torch.is_grad_enabled())
        found["checkpointing"] = model.is_gradient_checkpointing
        ids = torch.arange(10, 16)[None]
        with trainer.model.disable_adapter():
            off = model(input_ids=ids).logits
        found["adapters change logits by"] = (model(input_ids=ids).logits - off).abs().max()
        return Written()(rows, policy, round)

    trainer = online(tmp_path, source, data=rows(), peft_config=lora(), gradient_checkpointing=True, max_steps=2)
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                value.fill_(0.1)
    trainer.train()
    assert found["policy"] == (False, True, False) and not found["checkpointing"]
    assert found["adapters change logits by"] > 1e-3
    model = trainer.model
    assert model.training and model.is_gradient_checkpointing and "generate" not in vars(model.get_base_model())
    assert not model.config.use_cache


def test_rounds_are_steps_and_a_resumed_run_repeats_them(tmp_path):
    rounds = []

    def source(rows, policy, round=0):
        rounds.append((round, [row["row_name"] for row in rows]))
        return Written()(rows, policy, round)

    options = {"data": rows(), "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 4}
    whole = online(tmp_path / "a", source, **options, save_strategy="steps", save_steps=1)
    whole.train()
    assert [round for round, _ in rounds] == list(range(4))
    assert all(len(names) == 2 for _, names in rounds)
    every, wanted_losses = list(rounds), losses_of(whole)
    for steps in (1, 2):  # in the middle of an epoch, and at its end
        rounds.clear()
        resumed = online(tmp_path / "a", source, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{steps}"))
        assert rounds == every[steps:]
        assert_close(losses_of(resumed)[steps:], wanted_losses[steps:], rtol=1e-4, atol=1e-5)


def test_pairs_of_a_step_are_made_at_once_and_do_not_depend_on_its_micro_batches(tmp_path):
    found = []
    for size, steps, at_once in ((4, 1, 32), (1, 4, 32), (2, 2, 3)):
        source = Recorded(SelfSamples(max_new_tokens=4))
        trainer = online(
            tmp_path,
            source,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            pair_batch_size=at_once,
            learning_rate=1e-2,
        )
        measured = losses(trainer)
        calls = [len(said) for said in source.said]
        assert calls == ([4] * 3 if at_once > 3 else [3, 1] * 3)
        pairs = [pair for said in source.said for pair in said]
        found.append(([sorted(pairs[start : start + 4]) for start in (0, 4, 8)], measured))
    (pairs, wanted), *others = found
    for other, measured in others:
        assert other == pairs
        assert_close(measured, wanted, rtol=1e-4, atol=1e-5)
    assert pairs[0] != pairs[1]


def test_a_micro_batch_without_pairs_is_weightless_beside_one_that_has_them(tmp_path):
    def source(rows, policy, round=0):
        return [row if row["row_name"] in ("train row 0", "train row 1") else None for row in rows]

    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1, "data": rows()}
    (entry,) = logs(online(tmp_path, source, **options))
    assert entry["pairs/none"] == 0.5 and entry["pairs/undecided"] == 0.5 and entry["pairs/left_out"] == 0.0


def test_a_batch_of_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`pair_batch_size` is 0; a source gets 1 row or more"):
        online(tmp_path, Written(), pair_batch_size=0)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TestUndecidedRows:
    def test_they_are_left_out_and_their_share_is_logged(self, tmp_path):
        data = rows().select([0, 1, 3])
        wanted = losses(make(DPOTrainer, DPOConfig, tmp_path, data=data, **SHORT | {"max_steps": 1}))

        def source(rows, policy, round=0):
            return [None if row["row_name"] == "train row 2" else row for row in rows]

        (entry,) = logs(online(tmp_path, source, data=rows(), max_steps=1))
        assert entry["loss"] == pytest.approx(wanted[0], rel=1e-5)
        assert entry["pairs/undecided"] == 0.25 and entry["pairs/none"] == 0 and entry["pairs/left_out"] == 0

    def test_a_step_without_any_pair_has_no_gradient_and_leaves_the_metrics_alone(self, tmp_path):
        def source(rows, policy, round=0):
            return [None if round == 1 else row for row in rows]

        trainer = online(tmp_path, source, data=rows(), optim="sgd", dense_preset="paper", max_grad_norm=0)
        first, empty, third = logs(trainer)
        assert empty["loss"] == empty["grad_norm"] == 0.0
        assert empty["pairs/undecided"] == empty["pairs/none"] == 1.0
        assert "rewards/margins" not in empty and "rewards/margins" in third
        two = logs(online(tmp_path, Written(), data=rows(), optim="sgd", dense_preset="paper", max_grad_norm=0))
        assert third["loss"] == pytest.approx(two[1]["loss"], rel=1e-5)
        assert third["num_tokens"] == two[1]["num_tokens"]


def test_a_source_may_add_rejected_replies_and_the_loss_is_averaged(tmp_path):
    other = message("No dog is there.")
    data = rows().add_column("rejected_extra", [[other]] * 4)
    wanted = losses(make(DPOTrainer, DPOConfig, tmp_path, data=data, rejected_weight=0.3, **SHORT))
    found = losses(online(tmp_path, Written(rejected_extra=[other]), data=rows(), rejected_weight=0.3))
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_rows_without_an_image_column_train_like_rows_without_images(tmp_path):
    found = losses(online(tmp_path, Written(), data=text_rows()))
    assert_close(found, losses(make(DPOTrainer, DPOConfig, tmp_path, data=text_rows(), **SHORT)), rtol=1e-4, atol=1e-5)


def test_spans_go_with_the_replies_that_they_are_about(tmp_path):
    spans = rows().add_column("rejected_spans", [[[0, 5]]] * 4).add_column("other", [message("No.")] * 4)
    kept, dropped = (made_pairs(source, [spans[0]], None, 0, 1)[0] for source in (Written(), Written("other")))
    assert kept["rejected_spans"] == [[0, 5]] and "rejected_spans" not in dropped
    assert len(losses(online(tmp_path, Written("other"), data=spans, dense_preset="paper"))) == 3


class TestEvaluation:
    def test_the_rows_own_pairs_are_used(self, tmp_path):
        source = Greedy()
        wanted = make(DPOTrainer, DPOConfig, tmp_path, eval_dataset=rows(), **SHORT).evaluate()
        found = online(tmp_path, source, eval_dataset=rows()).evaluate()
        assert not source.seen
        assert found["eval_logps/rejected"] == pytest.approx(wanted["eval_logps/rejected"], rel=1e-5)

    def test_rows_without_pairs_get_the_sources_always_with_the_same_draws(self, tmp_path):
        source = Greedy()
        trainer = online(tmp_path, source, eval_dataset=instructions((1, 1)), max_steps=1)
        first = trainer.evaluate()
        trainer.evaluate()
        assert source.seen[0] == source.seen[1] and source.seen[0]["round"] == 0
        assert source.seen[0]["names"] == ["eval row 0", "eval row 1"]
        assert "eval_pairs/undecided" in first
        trainer.train()
        assert source.seen[2]["round"] == 0 and source.seen[2]["names"] != source.seen[0]["names"]


def test_streamed_rows_train_too(tmp_path):
    source = Greedy()
    assert len(losses(online(tmp_path, source, data=instructions().to_iterable_dataset()))) == 3
    assert source.seen[0]["names"] == [f"train row {number}" for number in range(4)]


def test_the_watch_for_degeneration_sees_the_prompts(tmp_path):
    trainer = online(tmp_path, Greedy(), degeneration_steps=1, degeneration_max_new_tokens=4, max_steps=1)
    assert "degeneration/repeats" in logs(trainer)[0]


def test_a_family_with_a_processor_of_its_own_kind_trains(tmp_path):
    for family in ("paligemma", "qwen2_5_vl"):
        source = Greedy()
        assert len(losses(online(tmp_path, source, family=family, max_steps=2))) == 2
        assert any(source.seen[-1]["replies"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"reference_cache": "cache"}, "`reference_cache` cannot be combined with `pair_source`: it holds"),
            ({"precompute_ref_log_probs": True}, "`precompute_ref_log_probs` cannot be combined with"),
        ],
    )
    def test_what_does_not_go_with_it_says_why(self, options, reason, tmp_path):
        with pytest.raises(ValueError, match=reason):
            online(tmp_path, Greedy(), **options)

    def test_an_adapter_of_virtual_tokens_is_refused(self, tmp_path):
        prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match="Pairs cannot be made with a PROMPT_TUNING adapter"):
            online(tmp_path, Greedy(), peft_config=prompts)

    def test_a_model_without_images_is_refused(self):
        with pytest.raises(TypeError, match="`pair_source` needs a vision-language model"):
            check_arguments(DPOConfig("out", use_cpu=True, bf16=False), load_processor("llava").tokenizer, None)

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            ([], "gave 0 entries for 1 rows. It must give one per row"),
            ([{"chosen": "text", "rejected": []}], "train row 0: .* gave 'text' as 'chosen'. It must be a list of"),
        ],
    )
    def test_a_source_that_gives_something_else_is_named(self, made, message, tmp_path):
        trainer = online(tmp_path, lambda rows, policy, round=0: made)
        with pytest.raises(ValueError, match=message):
            trainer._prepare_inputs([trainer.train_dataset[0]])

    def test_pairs_with_different_numbers_of_replies_are_an_error(self, tmp_path):
        source = Greedy()

        def mixed(rows, policy, round=0):
            source.extra = 1
            return source(rows[:1], policy) + Greedy()(rows[1:], policy)

        with pytest.raises(ValueError, match=r"different numbers of `rejected_extra`: \[0, 1\]"):
            online(tmp_path, mixed).train()

    def test_rows_without_a_prompt_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"The train dataset lacks the column\(s\) \['prompt'\]"):
            online(tmp_path, Greedy(), data=rows().remove_columns("prompt"))
