"""What `DPOTrainer` relies on in TRL and transformers. A failure here says which assumption to look at."""

from inspect import signature

import pytest
import torch
import trl
from accelerate import Accelerator
from transformers import AttentionInterface
from transformers.generation import utils as generation_utils
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from tests.families import build
from tests.trainers.dpo.helpers import make, rows
from trl_vlm.models.prefix_sharing.attention import ATTENTION
from trl_vlm.trainers import _trl


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """TRL's own trainer, on rows with images."""
    return make(trl.DPOTrainer, trl.DPOConfig, tmp_path_factory.mktemp("stock"), beta=0.5)


class Scores:
    """In the place of a model: gives these log-probabilities and keeps what it was called with."""

    def __init__(self, log_probs):
        self.log_probs, self.calls = log_probs, []

    def __call__(self, **arguments):
        self.calls.append(arguments)
        zeros = torch.zeros_like(self.log_probs)
        return FusedCausalLMOutput(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


@pytest.fixture
def batch(stock):
    """Two pairs with one key that TRL does not know."""
    collated = stock.data_collator([dict(rows()[index]) for index in (0, 1)])
    return {**collated, "ours": "for the model"}


@pytest.fixture
def policy(batch):
    """Log-probabilities that are zero outside the replies."""
    is_reply = batch["completion_mask"][:, 1:]
    return Scores(-torch.rand(is_reply.shape, generator=torch.Generator().manual_seed(0)) * is_reply)


def test_trl_hands_extra_batch_keys_to_the_model_and_sums_up_its_log_probs(stock, batch, policy, monkeypatch):
    reference = Scores(policy.log_probs * 0.5)
    monkeypatch.setattr(stock, "ref_model", reference)
    loss = stock._compute_loss(policy, batch, False)
    for (call,) in (policy.calls, reference.calls):
        assert call["ours"] == "for the model" and call["fused_lm_head"] is True
        assert "completion_mask" not in call and "ref_chosen_logps" not in call
        is_prompt = batch["completion_mask"] == 0
        assert torch.equal(call["labels"], batch["input_ids"].masked_fill(is_prompt, -100))
    chosen, rejected = (policy.log_probs - reference.log_probs).sum(1).chunk(2)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean())
    assert list(signature(trl.DPOTrainer._compute_loss).parameters) == ["self", "model", "inputs", "return_outputs"]


def test_trl_reads_a_reference_off_the_batch_when_told_so(stock, batch, policy, monkeypatch):
    monkeypatch.setattr(stock, "precompute_ref_logps", True)
    monkeypatch.setattr(stock, "ref_model", None)
    reference = {"ref_chosen_logps": torch.tensor([-3.0, -1.0]), "ref_rejected_logps": torch.tensor([-2.0, -4.0])}
    loss = stock._compute_loss(policy, batch | reference, False)
    chosen, rejected = policy.log_probs.sum(1).chunk(2)
    margin = chosen - reference["ref_chosen_logps"] - rejected + reference["ref_rejected_logps"]
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(0.5 * margin).mean())


def test_trl_sums_up_the_log_probs_of_a_reference(stock, batch, policy):
    found = stock.compute_ref_log_probs(policy, batch)
    torch.testing.assert_close(torch.cat(found), policy.log_probs.sum(1))
    assert list(signature(trl.DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]


def test_the_vision_collator_has_one_processor_and_one_call_of_it_with_images(stock, monkeypatch):
    """The prompts come once for the chosen and once for the rejected replies, and the images of both with them."""
    collator, calls = stock.data_collator, []
    processor = collator.processor

    class Recorded:
        def __call__(self, *args, **arguments):
            calls.append(arguments)
            return processor(*args, **arguments)

        def __getattr__(self, name):
            return getattr(processor, name)

    monkeypatch.setattr(collator, "processor", Recorded())
    collator([dict(rows()[index]) for index in (0, 1)])
    ((texts, images),) = [(call["text"], call["images"]) for call in calls if call.get("images") is not None]
    assert len(texts) == len(images) == 4
    assert texts[:2] == texts[2:] and images[:2] == images[2:]


def test_a_fused_forward_asks_the_backbone_and_returns_log_probs_at_the_token_before():
    assert {"log_probs", "entropy", "mean_logits", "is_top1"} <= FusedCausalLMOutput.__dataclass_fields__.keys()
    model, _ = build("llava")
    add_fused_lm_head(model)
    ids = torch.arange(10, 20)[None]
    calls = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        wanted = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    assert len(calls) == 2
    torch.testing.assert_close(found, wanted)


def test_the_columns_that_trl_lets_through_are_a_list_that_can_grow(stock, monkeypatch):
    monkeypatch.setattr(stock, "_signature_columns", None)
    stock._set_signature_columns_if_needed()
    stock._signature_columns += ["ours"]
    stock._set_signature_columns_if_needed()
    assert "ours" in stock._signature_columns and "images" in stock._signature_columns


def test_transformers_takes_an_attention_function_and_a_four_dimensional_mask():
    assert ATTENTION in AttentionInterface().valid_keys()
    model, _ = build("llava")
    ids = torch.arange(10, 16)[None]
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        found, wanted = model(input_ids=ids, attention_mask=causal).logits, model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted)


def test_trl_gathers_a_model_for_generation(stock):
    assert list(signature(_trl.unwrap_model_for_generation).parameters)[:2] == ["model", "accelerator"]
    assert "gradient_checkpointing_kwargs" in signature(_trl.unwrap_model_for_generation).parameters
    backend = _trl.DistributedBackend(Accelerator(cpu=True))
    with backend.summon_full_params(torch.nn.Linear(1, 1), recurse=False):
        assert not backend.is_fsdp


def test_a_trainer_says_where_its_metrics_and_its_tokens_are(stock):
    assert stock._metrics.keys() == {"train", "eval"}
    assert stock._metrics["train"]["a new name"] == []
    assert stock._is_vision_dataset is True and stock._total_train_tokens == 0


def test_trl_collates_rows_with_images_without_preparing_them(tmp_path):
    """So a row needs its rejected reply only where it is collated."""
    unfinished = rows().remove_columns("rejected")
    trainer = make(trl.DPOTrainer, trl.DPOConfig, tmp_path, data=unfinished)
    assert trainer.train_dataset.column_names == unfinished.column_names


def test_generate_waits_for_other_processes_under_zero3_unless_told_not_to(monkeypatch):
    """When this fails, see whether `fresh_pairs` must still say `synced_gpus=False`."""
    model, _ = build("llava")
    monkeypatch.setattr(generation_utils, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(generation_utils, "_get_torch_distributed_world_size", lambda: 2)
    ids = torch.arange(10, 16)[None]
    with pytest.raises(ValueError, match="process group has not been initialized"):
        model.generate(input_ids=ids, max_new_tokens=2)
    assert model.generate(input_ids=ids, max_new_tokens=2, synced_gpus=False).shape[1] > 6
