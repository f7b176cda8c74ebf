"""What PPO relies on in TRL, one contract each: these fail first when a new TRL has moved something."""

import importlib
import inspect
import sys

import pytest
import torch
import trl
from torch.testing import assert_close
from trl import GRPOConfig, GRPOTrainer

from tests import families
from tests.trainers.ppo.helpers import count_letters, rollout, rows, settings
from tests.trainers.test_options import make
from trl_vlm import PPOTrainer
from trl_vlm.models.families import IMAGE_INPUTS, TOKEN_TYPES
from trl_vlm.trainers import _trl
from trl_vlm.trainers.ppo.rollout import reply_mask


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_overridden_methods_have_the_signatures_that_we_override():
    assert parameters(GRPOTrainer._calculate_rewards) == [
        *("self", "inputs", "prompts", "completions", "completion_ids_list")
    ]
    assert parameters(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert parameters(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]
    passed = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert passed[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert "token_type_ids" in passed
    assert parameters(GRPOTrainer._load_optimizer_and_scheduler) == ["self", "checkpoint"]
    assert parameters(GRPOTrainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(GRPOTrainer.create_optimizer) == ["self", "model"]
    assert parameters(_trl.add_fused_lm_head)[:3] == ["model", "temperature", "cast_lm_head_to_fp32"]
    assert parameters(_trl.prepare_deepspeed)[:2] == ["model", "accelerator"]
    assert parameters(_trl.prepare_fsdp)[:2] == ["model", "accelerator"]
    assert parameters(_trl.disable_gradient_checkpointing)[:2] == ["model", "gradient_checkpointing_kwargs"]


def test_every_image_input_of_trls_log_probability_pass_is_handed_on():
    """A family whose new input we would drop would read its images wrongly."""
    known = {"self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"}
    known |= {"compute_entropy", "compute_aux_loss"}
    assert set(parameters(GRPOTrainer._get_per_token_logps_and_entropies)) - known == {*IMAGE_INPUTS, *TOKEN_TYPES} - {
        "batch_num_images"
    }


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    args = GRPOConfig(
        str(tmp_path_factory.mktemp("grpo")),
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=4,
        use_cpu=True,
        bf16=False,
        beta=0.1,
        report_to="none",
    )
    return GRPOTrainer(str(families.saved("llava", sharp=3.0)), count_letters, args, train_dataset=rows([1, 1]))


def test_a_rollout_of_trl_has_what_ppo_reads(grpo):
    grpo.model.train()
    batch = grpo._generate_and_score_completions([rows([1])[0]] * 2)
    shape = batch["completion_ids"].shape
    assert batch["completion_mask"].shape == batch["ref_per_token_logps"].shape == shape
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape
    assert batch["num_images"] == [1, 1] and batch["num_items_in_batch"].ndim == 0
    assert "old_per_token_logps" not in batch  # on policy TRL leaves it out, and PPO computes it
    assert isinstance(grpo.eos_token_ids, list) and grpo._step == 0
    assert {"train", "eval"} == grpo._metrics.keys()
    assert grpo.reward_weights.shape == (1,)


def test_trls_loss_takes_advantages_per_token_and_normalises_by_the_tokens_of_the_update(grpo):
    grpo.model.train()
    batch = grpo._generate_and_score_completions([rows([1])[0]] * 2)
    grpo.current_gradient_accumulation_steps, beta, grpo.beta = 1, grpo.beta, 0.0
    mask = batch["completion_mask"]
    advantages = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    loss = grpo._compute_loss(grpo.model, {**batch, "advantages": advantages}).item()
    grpo.beta = beta
    # On policy the ratio is 1, and the default loss ("dapo") is a mean over the tokens of the update.
    assert grpo.loss_type == "dapo"
    assert loss == pytest.approx(-(advantages * mask).sum().item() / mask.sum().item(), rel=1e-5)


def test_trl_still_lets_paligemmas_replies_see_their_later_tokens(tmp_path):
    """When this fails, what `family_inputs` says about token types can be deleted."""
    trainer = PPOTrainer(str(families.saved("paligemma", sharp=6.0)), count_letters, settings(tmp_path), rows([1, 1]))
    batch = rollout(trainer, [0, 1])
    assert not batch["token_type_ids"][:, -batch["completion_ids"].shape[1] :].any()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    images = {name: batch[name] for name in ("pixel_values", "num_images", "token_type_ids")}
    logps = []
    for last in (60, 70):
        ids[:, -1] = last
        with torch.no_grad():
            found = GRPOTrainer._get_per_token_logps_and_entropies(
                trainer, trainer.model, ids, mask, batch["completion_ids"].shape[1], **images
            )
        logps.append(found[0][:, :-1])
    with pytest.raises(AssertionError):
        assert_close(*logps, rtol=0, atol=1e-5)


def test_trl_still_counts_rollouts_from_zero_after_a_resumption(tmp_path):
    """When this fails, the line about `_step` in `PPOTrainer._load_optimizer_and_scheduler` can be deleted."""

    def trained(max_steps, **options):
        args = GRPOConfig(
            str(tmp_path),
            max_steps=max_steps,
            save_steps=1,
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        trainer = GRPOTrainer(str(families.saved("llava")), count_letters, args, train_dataset=rows([1, 1]))
        trainer.train(**options)
        return trainer

    assert trained(1)._step == 1
    resumed = trained(2, resume_from_checkpoint=True)
    assert resumed.state.global_step == 2 and resumed._step == 1


@pytest.mark.parametrize(
    "owner, name",
    [
        (trl.models.utils, "disable_gradient_checkpointing"),
        (trl.trainer.utils, "add_fused_lm_head"),
        (GRPOTrainer, "_calculate_rewards"),
    ],
    ids=["function", "fused head", "method"],
)
def test_a_trl_that_lacks_a_name_is_refused_with_the_name_and_the_versions(owner, name, monkeypatch):
    monkeypatch.delattr(owner, name)
    monkeypatch.delitem(sys.modules, "trl_vlm.trainers._trl")
    with pytest.raises(ImportError, match=rf"trl_vlm needs `.*{name}`, which TRL .* Run `pip install 'trl>=1.16,<2'`"):
        importlib.import_module("trl_vlm.trainers._trl")


@pytest.mark.parametrize("method", ["DPO", "Reward", "PPO"])
def test_a_trl_whose_constructor_no_longer_sets_what_we_read_is_refused_with_the_name(method, tmp_path, monkeypatch):
    theirs = {"DPO": "DPOTrainer", "Reward": "RewardTrainer", "PPO": "GRPOTrainer"}[method]
    trainer = make(method, tmp_path)  # of this TRL, nothing is missing
    _trl.check_attributes(trainer)
    monkeypatch.setitem(_trl.ATTRIBUTES, theirs, (*_trl.ATTRIBUTES[theirs], "_gone"))
    with pytest.raises(ImportError, match=rf"trl_vlm needs `{theirs}._gone`, which TRL .* Run `pip install"):
        _trl.check_attributes(trainer)


def test_a_release_of_trl_that_was_never_tried_is_named_once(caplog):
    _trl.warn_if_untested("1.16.2")
    assert not caplog.text
    _trl.warn_if_untested("1.17.0.dev0")
    assert "was not tested with TRL 1.17.0.dev0 (tested: 1.16)" in caplog.text


def test_tokens_that_a_tool_wrote_are_no_part_of_a_reply():
    """TRL marks them in `tool_mask`: they are in the sequence, and nothing is learnt from them."""
    batch = {"completion_mask": torch.tensor([[1, 1, 1, 0]]), "tool_mask": torch.tensor([[1, 0, 1, 1]])}
    assert reply_mask(batch).tolist() == [[1, 0, 1, 0]]
    assert "tool_mask" in {
        const for const in GRPOTrainer._generate_and_score_completions.__code__.co_consts if isinstance(const, str)
    }


def test_trls_method_for_vllms_weights_takes_no_argument():
    """`PPOTrainer._without_critic` stands in for it."""
    from trl.generation.vllm_generation import VLLMGeneration

    assert parameters(VLLMGeneration.sync_weights) == ["self"]
