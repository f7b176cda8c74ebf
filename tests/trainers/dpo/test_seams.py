"""What `DPOTrainer` relies on in TRL and transformers. A failure here says which assumption to look at."""

from inspect import getsource, signature

import torch
import trl
from accelerate import Accelerator
from transformers import AttentionInterface, GenerationMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from tests.families import build
from trl_vlm.models.prefix_sharing.sharing import ATTENTION
from trl_vlm.trainers import _trl


def test_trl_hands_extra_batch_keys_to_the_model_and_reads_log_probs():
    source = getsource(trl.DPOTrainer._compute_loss)
    assert '{"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}' in source
    assert "fused_lm_head=True" in source and "per_token_logps.sum(dim=1)" in source
    assert list(signature(trl.DPOTrainer._compute_loss).parameters) == ["self", "model", "inputs", "return_outputs"]


def test_trl_reads_a_reference_off_the_batch_when_told_so():
    source = getsource(trl.DPOTrainer._compute_loss)
    assert "self.precompute_ref_logps" in source and 'inputs["ref_chosen_logps"]' in source
    assert list(signature(trl.DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]


def test_the_vision_collator_has_a_processor_and_repeats_prompts_for_both_replies():
    assert "processor" in DataCollatorForVisionPreference.__dataclass_fields__
    source = getsource(DataCollatorForVisionPreference.torch_call)
    assert 'prompts = [example["prompt"] for example in examples] * 2' in source
    assert source.count("images=images,\n            text=prompts") == 1


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


def test_the_columns_that_trl_lets_through_are_a_list_that_can_grow():
    source = getsource(trl.DPOTrainer._set_signature_columns_if_needed)
    assert "self._signature_columns = [" in source


def test_transformers_takes_an_attention_function_and_a_four_dimensional_mask():
    assert ATTENTION in AttentionInterface().valid_keys()
    model, _ = build("llava")
    ids = torch.arange(10, 16)[None]
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        found, wanted = model(input_ids=ids, attention_mask=causal).logits, model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted)


def test_trl_gathers_a_model_for_generation_and_a_trainer_says_where_its_parts_are():
    assert list(signature(_trl.unwrap_model_for_generation).parameters)[:2] == ["model", "accelerator"]
    assert "gradient_checkpointing_kwargs" in signature(_trl.unwrap_model_for_generation).parameters
    backend = _trl.DistributedBackend(Accelerator(cpu=True))
    with backend.summon_full_params(torch.nn.Linear(1, 1), recurse=False):
        assert not backend.is_fsdp
    source = getsource(trl.DPOTrainer)
    assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source
    assert "self._is_vision_dataset = " in source and "self._total_train_tokens" in source


def test_trl_collates_rows_with_images_without_preparing_them():
    """So a row needs its rejected reply only where it is collated."""
    assert "skip_prepare_dataset = self._is_vision_dataset" in getsource(trl.DPOTrainer.__init__)


def test_generate_waits_for_other_processes_under_zero3_unless_told_not_to():
    """When this fails, see whether `fresh_pairs` must still say `synced_gpus=False`."""
    assert "is_deepspeed_zero3_enabled()" in getsource(GenerationMixin._extract_generation_mode_kwargs)
    assert "synced_gpus" in signature(GenerationMixin.generate).parameters
