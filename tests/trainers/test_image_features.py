"""Every trainer that computes an image several times encodes it once where nothing of the tower trains."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate import FullyShardedDataParallelPlugin
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

import trl_vlm
from tests import families
from tests.encoded_images import watched
from tests.lora_models import reward_adapter
from tests.trainers.dpo.helpers import losses as dpo_losses
from tests.trainers.dpo.helpers import make as make_dpo
from tests.trainers.dpo.helpers import rows as pairs
from tests.trainers.ppo.helpers import lora, rows, settings
from trl_vlm import DPOConfig, DPOTrainer, PPOConfig, PPOTrainer
from trl_vlm.rewards import RewardModelReward
from trl_vlm.rewards.reward_model import reward_models_in
from trl_vlm.trainers import image_features
from trl_vlm.trainers.adapters import lora_targets

SHARP = 3.0
# Their towers multiply the patches of all images at once, and round otherwise for other numbers of patches.
ROUNDING = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
CHECKPOINTING = {
    "none": {},
    "plain": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def trained_weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_the_same_weights(first, second, tolerance=0.0):
    one, other = trained_weights(first), trained_weights(second)
    assert one.keys() == other.keys() and len(one) > 4
    for name, weight in one.items():
        assert_close(weight, other[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# DPO


def dpo(folder, cache, family="llava", **options):
    """Two steps, which see each of four rows once; the images are four in all."""
    return make_dpo(
        *(DPOTrainer, DPOConfig, folder, family),
        data=pairs((1, 1, 1, 1)) if family == "paligemma" else pairs((1, 2, 0, 1)),
        **{"peft_config": lora(target_modules="language-model", exclude_modules=None), **options},
        **{"image_feature_cache": 1.0 if cache else 0.0, "max_steps": 2},
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("share", [True, False])
def test_dpo_encodes_an_image_once_per_pair_for_policy_and_reference(share, kind, tmp_path):
    runs = {cache: dpo(tmp_path, cache, share_prefix=share, **CHECKPOINTING[kind]) for cache in (True, False)}
    with watched(runs[True].model) as passes:
        found = dpo_losses(runs[True])
    assert len(passes.rows()) == len(set(passes.rows())) == 4
    with watched(runs[False].model) as passes:
        assert dpo_losses(runs[False]) == found
    assert len(passes.rows()) >= 8
    assert_the_same_weights(*runs.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_dpo_ends_with_the_same_weights(family, tmp_path):
    runs = {cache: dpo(tmp_path, cache, family) for cache in (True, False)}
    numbers = {}
    for cache, trainer in runs.items():
        with watched(trainer.model) as passes:
            found = dpo_losses(trainer)
        numbers[cache] = (len(passes), found)
    assert 0 < 2 * numbers[True][0] <= numbers[False][0]
    assert numbers[True][1] == numbers[False][1]
    assert_the_same_weights(*runs.values())


def test_a_reference_of_its_own_with_the_same_tower_reads_the_policys_features(tmp_path):
    policy = AutoModelForImageTextToText.from_pretrained(families.saved("llava", sharp=4.0))
    policy.model.vision_tower.requires_grad_(False)
    policy.model.multi_modal_projector.requires_grad_(False)
    reference = copy.deepcopy(policy)
    trainer = dpo(tmp_path, True, model=policy, ref_model=reference, peft_config=None)
    with watched(policy, reference) as passes:
        trainer.train()
    assert len(passes.rows()) == 4


def test_the_features_of_a_batch_are_forgotten_with_the_next(tmp_path):
    trainer = dpo(tmp_path, True)
    trainer.train()
    assert 0 < len(trainer._image_features) <= 3  # the last batch has two rows


# Rollouts


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    @functools.cache
    def make(family="llava"):
        base = families.saved(family, sharp=SHARP)
        targets = lora_targets(AutoModelForImageTextToText.from_pretrained(base))
        return reward_adapter(base, tmp_path_factory.mktemp(family), target_modules=targets)

    return make


def ppo(folder, cache, reward, family="llava", share=True, **options):
    """Two rollouts of four rows with four images, each passed over twice in two mini-batches."""
    return PPOTrainer(
        str(families.saved(family, sharp=SHARP)),
        args=settings(
            folder,
            **{
                "share_base": share,
                "num_ppo_epochs": 2,
                "num_mini_batches": 2,
                "max_steps": 8,
                "check_pixels": False,  # it looks at other images
                "image_feature_cache": 1.0 if cache else 0.0,
                **options,
            },
        ),
        train_dataset=rows([1, 1, 1, 1] if family == "paligemma" else [1, 2, 0, 1]),
        peft_config=lora(target_modules="language-model"),
        reward_model=reward(family),
    )


def models_of(trainer):
    scoring = [reward.model for function in trainer.reward_funcs for reward in reward_models_in(function)]
    whole = [
        model for model in (*scoring, trainer.value_model) if any("vision" in n for n, _ in model.named_modules())
    ]
    return [trainer.model, *whole]


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_ppo_encodes_an_image_once_per_rollout_for_all_roles_and_passes(kind, share, reward, tmp_path):
    once = ppo(tmp_path, True, reward, share=share, **CHECKPOINTING[kind])
    with watched(*models_of(once)) as passes:
        once.train()
    assert len(passes.rows()) == 2 * 4 and len(set(passes.rows())) == 4
    each_time = ppo(tmp_path, False, reward, share=share, **CHECKPOINTING[kind])
    each_time.train()
    assert_the_same_weights(once, each_time)
    assert_the_same_logs(once, each_time)


@pytest.mark.slow
def test_in_bfloat16_ppo_encodes_an_image_once_for_all_roles_and_passes(reward, tmp_path):
    """With an adapter `generate` runs outside autocast, and all else inside."""
    once = ppo(tmp_path, True, reward, bf16=True)
    with watched(*models_of(once)) as passes:
        once.train()
    assert len(passes.rows()) == 2 * 4 and len(set(passes.rows())) == 4


@pytest.mark.slow
def test_in_bfloat16_dpo_encodes_an_image_once_per_pair(tmp_path):
    runs = {cache: dpo(tmp_path, cache, bf16=True) for cache in (True, False)}
    with watched(runs[True].model) as passes:
        found = dpo_losses(runs[True])
    assert len(passes.rows()) == len(set(passes.rows())) == 4
    assert dpo_losses(runs[False]) == found
    assert_the_same_weights(*runs.values())


def assert_the_same_logs(first, second):
    logs = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (first, second)]
    assert len(logs[0]) == len(logs[1]) > 1
    for one, other in zip(*logs, strict=True):
        kept = [name for name in one if "time" not in name and name != "epoch"]
        assert {name: one[name] for name in kept} == {name: other[name] for name in kept}


@pytest.mark.nightly
@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family != "llava"])
def test_ppo_ends_with_the_same_weights(family, reward, tmp_path):
    """Each image once, and not nine times: generation, reward, reference, old policy and critic, twice both."""
    runs, numbers = [], []
    options = {"optim": "sgd", "learning_rate": 0.3, "generation_kwargs": {"do_sample": False}}
    for cache in (True, False):
        runs.append(ppo(tmp_path, cache, reward, family, **options))
        with watched(runs[-1].model) as passes:
            runs[-1].train()
        numbers.append(len(passes))
    assert 0 < 9 * numbers[0] == numbers[1]
    assert_the_same_weights(*runs, tolerance=1e-6 if family in ROUNDING else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "precision"), [("GRPO", "float32"), ("RLOO", "float32"), ("GRPO", "bfloat16"), ("RLOO", "bfloat16")]
)
def test_groups_encode_the_image_of_a_prompt_once(method, precision, reward, tmp_path):
    """Two rollouts of two prompts with three images and two replies each, passed over twice."""
    runs = {}
    for cache in (True, False):
        config = getattr(trl_vlm, f"{method}Config")(
            str(tmp_path),
            **{"num_generations": 2, "per_device_train_batch_size": 4, "num_iterations": 2, "max_steps": 4},
            **{"max_completion_length": 4, "beta": 0.1, "learning_rate": 0.1, "save_strategy": "no"},
            **{"use_cpu": True, "bf16": precision == "bfloat16", "report_to": "none", "logging_steps": 1},
            image_feature_cache=1.0 if cache else 0.0,
        )
        trainer = getattr(trl_vlm, f"{method}Trainer")(
            str(families.saved("llava", sharp=SHARP)),
            reward_funcs=RewardModelReward(reward()),
            args=config,
            train_dataset=rows([1, 2]),
            peft_config=lora(target_modules="language-model"),
        )
        with watched(trainer.model) as passes:
            trainer.train()
        runs[cache] = (trainer, passes)
    assert len(runs[True][1].rows()) == 2 * 3 and len(set(runs[True][1].rows())) == 3
    assert len(runs[False][1].rows()) > 10 * 3
    if precision == "float32":  # else the features of generation are rounded, and without the cache they are not
        assert_the_same_weights(runs[True][0], runs[False][0])


@pytest.mark.slow
def test_a_limit_below_a_rollouts_features_costs_passes_and_no_digits(reward, tmp_path, caplog):
    few = ppo(tmp_path, True, reward, image_feature_cache=600 / 2**30)  # of one image and a bit
    with watched(few.model) as passes, caplog.at_level("WARNING", "trl_vlm"):
        few.train()
    assert len(passes.rows()) > 2 * 4 and few._image_features.size <= 600
    assert caplog.text.count("`image_feature_cache` hold: some are encoded again") == 1
    enough = ppo(tmp_path, True, reward)
    enough.train()
    assert_the_same_weights(few, enough)


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_whole_one(reward, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = ppo(tmp_path, True, reward, **options)
    whole.train()
    rest = ppo(tmp_path, True, reward, **options)
    with watched(rest.model) as passes:
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(passes.rows()) == 4
    assert_the_same_weights(whole, rest)


# What is told, and what is refused


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ("language-model", "The policy encodes its images once for all passes that read them"),
        ("all-linear", "The policy encodes its images in each pass: an adapter stands on its vision tower"),
        (None, "The policy encodes its images in each pass: its vision tower or projector trains"),
    ],
)
def test_the_log_says_what_encodes_its_images_once_and_why_the_rest_does_not(targets, reason, tmp_path, caplog):
    peft_config = None if targets is None else lora(target_modules=targets)
    with caplog.at_level("INFO", "trl_vlm"):
        dpo(tmp_path, True, peft_config=peft_config)
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"image_feature_cache": 0}, "`image_feature_cache` is 0"), ({"torch_compile": True}, "`torch_compile` is not")],
)
def test_options_that_turn_it_off_are_named(options, reason):
    given = {"image_feature_cache": 1.0, "torch_compile": False, **options}
    assert image_features._why_never(SimpleNamespace(**given)).startswith(reason)


@pytest.mark.parametrize("zero3", [True, False])
def test_the_models_of_the_backend_are_split_and_reward_models_are_whole(zero3, tmp_path, monkeypatch):
    trainer = dpo(tmp_path, True)
    model = AutoModelForImageTextToText.from_pretrained(families.saved("llava")).requires_grad_(False)
    monkeypatch.setattr(image_features, "is_deepspeed_zero3_enabled", lambda: zero3)
    image_features.features_of_run(trainer, {"policy": trainer.model}, [model])
    policy = trainer.model.get_base_model()
    assert [vars(each.base_model)["_image_tower"]._is_split for each in (policy, model)] == [zero3, False]


def test_dpo_stops_where_split_towers_would_wait_for_a_process_without_images(tmp_path, monkeypatch):
    trainer = dpo(tmp_path, True)
    monkeypatch.setattr(image_features, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(image_features, "gathered", lambda _, mine: torch.cat([mine, 1 - mine]))
    with pytest.raises(RuntimeError, match="One process has a batch with images and another one without"):
        trainer.train()


def test_fsdp1_encodes_each_time_and_says_so(tmp_path, monkeypatch, caplog):
    trainer = dpo(tmp_path, True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with caplog.at_level("INFO", "trl_vlm"):
        image_features.features_of_run(trainer, {"policy": trainer.model})
    assert "The policy encodes its images in each pass: it is not tested under FSDP1" in caplog.text


@pytest.mark.parametrize("config", [DPOConfig, PPOConfig, trl_vlm.GRPOConfig, trl_vlm.RLOOConfig])
def test_a_negative_size_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="`image_feature_cache` is -1"):
        config(str(tmp_path), image_feature_cache=-1, use_cpu=True, bf16=False)


def test_trls_own_configuration_gets_the_default(tmp_path):
    trainer = make_dpo(DPOTrainer, trl.DPOConfig, tmp_path, peft_config=lora(target_modules="language-model"))
    assert trainer.args.image_feature_cache == 1.0
