"""The replies to a prompt share one pass through it, and GRPO, RLOO and PPO train as without."""

import pytest
import torch
import trl
from torch.testing import assert_close

import trl_vlm
from tests import families
from tests.lora_models import reward_adapter
from tests.more_families import MORE_FAMILIES
from tests.trainers.group_helpers import count_passes, count_tower_passes, logged, make, reply_ids, weights
from tests.trainers.ppo.helpers import lora, rollout
from tests.trainers.ppo.test_rollout_images import shuffled
from trl_vlm.models.families import FAMILIES as KNOWN
from trl_vlm.models.families import IMAGE_INPUTS, TOKEN_TYPES
from trl_vlm.models.prefix_sharing import sharing
from trl_vlm.trainers.group_sharing import GROUP, in_groups

METHODS = ("GRPO", "RLOO", "PPO")
# Qwen3.5 has layers that cannot keep replies apart; no table knows Mistral 3, whose first batch is tried.
FAMILIES = [*families.FAMILIES, *(family for family in MORE_FAMILIES if family != "qwen3_5")]


def scored(trainer, batch):
    """Log-probabilities and entropies of a micro-batch, and the gradients of a loss that tells all tokens apart."""
    mask = batch["completion_mask"]
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        reply_ids(batch),
        torch.cat([batch["prompt_mask"], mask], 1),
        mask.size(1),
        5,  # parts that cut groups
        compute_entropy=True,
        **{name: batch[name] for name in (*IMAGE_INPUTS, *TOKEN_TYPES) if name in batch},
    )
    trainer.model.zero_grad()
    ((logps + entropies) * torch.linspace(-1, 1, mask.numel()).view(mask.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return logps.detach(), entropies.detach(), gradients


def assert_scored_alike(found, wanted):
    assert wanted[0].abs().max() > 1
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert_close(one, other, rtol=1e-5, atol=2e-5)
    gradients = wanted[2]
    largest = max(gradient.norm() for gradient in gradients.values())
    assert found[2].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[2][name] - gradient).norm() < 1e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shuffled_rollout_has_the_log_probs_entropies_and_gradients_of_the_plain_one(family, tmp_path):
    images = (1, 1, 1) if family.startswith("paligemma") else (1, 2, 0)
    options = {"router_aux_loss_coef": 0.0} if family.endswith("moe") else {}
    trainer = make(
        "GRPO", tmp_path, family, images=images, num_generations=3, per_device_train_batch_size=9, **options
    )
    batch = rollout(trainer, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert trainer.shares_groups
    assert family != "llava" or not batch["prompt_mask"].all()  # TRL pads prompts on the left
    assert batch[GROUP].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    torch.manual_seed(0)
    (mixed,) = shuffled({**batch, "place": torch.arange(9)}, 1)
    tower = count_tower_passes(trainer.model)
    trainer.shares_groups = False
    in_order, plain = scored(trainer, batch), scored(trainer, mixed)
    pixels = sum(tower) // 2
    assert_close(plain[0], in_order[0][mixed["place"]], rtol=1e-5, atol=2e-5)  # each row kept its images
    trainer.shares_groups = True
    if family == "mistral3":  # the trial
        scored(trainer, mixed)
    tower.clear()
    assert_scored_alike(scored(trainer, mixed), plain)
    assert sum(tower) < pixels


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_in_bfloat16_sharing_differs_less_than_the_precision_does(family, tmp_path):
    options = {"num_generations": 3, "per_device_train_batch_size": 6}
    exact, rounded = (make("GRPO", tmp_path, family, **options, bf16=bf16) for bf16 in (False, True))
    batch = rollout(exact, [0, 0, 0, 1, 1, 1])
    wanted = scored(exact, batch)
    passes = count_passes(rounded.model)
    shared = scored(rounded, batch)
    assert passes == [1, 1]  # packed sequences
    rounded.shares_groups = False
    plain = scored(rounded, batch)
    for found, one, other in zip(shared[:2], plain[:2], wanted[:2], strict=True):
        assert (found - one).norm() < (one - other).norm()
    apart = [
        sum((one[2][name] - other[2][name]).square().sum() for name in wanted[2])
        for one, other in ((shared, plain), (plain, wanted))
    ]
    assert apart[0] < apart[1]


# Whole runs

TRAININGS = {
    "old and reference log-probabilities, groups that micro-batches cut": (
        "GRPO",
        {
            "beta": 0.1,
            "num_iterations": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "steps_per_generation": 4,
        },
    ),
    "adapters and checkpointing": (
        "GRPO",
        {"peft": lora(), "beta": 0.1, "gradient_checkpointing": True},
    ),
    "a loss over micro-batches": (
        "GRPO",
        {"loss_type": "bnpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ),
    "sequences and a quantile of entropies": (
        "GRPO",
        {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.5},
    ),
    "a reference, accumulation": (
        "RLOO",
        {"beta": 0.1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ),
}


FROZEN = {"freeze_vision_tower": True, "beta": 0.1, "num_iterations": 2}


def assert_trained_alike(one, other, start):
    logs = [logged(trainer) for trainer in (one, other)]
    assert len(logs[0]["loss"]) == 3
    for name, values in logs[0].items():
        assert logs[1][name] == pytest.approx(values, rel=1e-4, abs=2e-5), name
    wanted, found = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)
    assert max((wanted[name] - start[name]).abs().max() for name in wanted) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_a_run_is_that_of_trls_own_trainer(training, tmp_path):
    method, options = TRAININGS[training]
    theirs = make(method, tmp_path, module=trl, **options)
    start = weights(theirs)
    theirs.train()
    ours = make(method, tmp_path, **options)
    ours.train()
    assert ours.shares_groups
    assert_trained_alike(theirs, ours, start)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "idefics3"])
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_rows_with_and_without_images_train_as_without_sharing(method, family, tmp_path):
    trainers = []
    for share in (False, True):
        trainers.append(make(method, tmp_path, family, images=(2, 2, 0, 0), num_generations=2, share_prefix=share))
        if not share:
            start = weights(trainers[0])
        trainers[-1].train()
    assert_trained_alike(*trainers, start)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_a_frozen_tower_sees_an_image_once_in_a_rollout_of_groups(family, tmp_path):
    """Features of images are kept, and those of a prompt go to its replies once."""
    trainers, towers = [], []
    for share in (False, True):
        trainers.append(make("GRPO", tmp_path, family, share_prefix=share, **FROZEN))
        start = weights(trainers[-1])
        towers.append(count_tower_passes(trainers[-1].model))
        trainers[-1].train()
    assert_trained_alike(*trainers, start)
    assert towers[0] and sum(towers[1]) <= sum(towers[0])


@pytest.mark.slow
@pytest.mark.parametrize("on_one_base", [False, True], ids=["three models", "one base"])
def test_ppo_trains_as_without_sharing(on_one_base, tmp_path):
    more = {"reward_model": reward_adapter(families.saved("llava", sharp=6.0), tmp_path / "reward")}
    options = {"num_ppo_epochs": 2, "kl_coef": 0.5, "share_base": on_one_base}
    # One optimizer step per pass, so that the order of the rows does not matter.
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainers = []
    for share in (False, True):
        trainer = make("PPO", tmp_path, peft=lora(), more=more, images=(1, 1), share_prefix=share, **options)
        assert trainer.shares_groups is share
        start = weights(trainer)
        trainer.train()
        trainers.append(trainer)
    assert_trained_alike(*trainers, start)


@pytest.mark.slow
@pytest.mark.parametrize("images", [(1, 1), (1, 0)])
def test_paligemma_trains_as_without_sharing(images, tmp_path):
    """PPO reads its replies causally on both paths."""
    trainers = []
    for share in (False, True):
        options = {"kl_coef": 0.5, "num_ppo_epochs": 1, "check_pixels": False, "share_prefix": share}
        trainer = make("PPO", tmp_path, "paligemma", images=images, **options)
        assert trainer.shares_groups is share
        start = weights(trainer)
        trainer.train()
        trainers.append(trainer)
    assert_trained_alike(*trainers, start)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [True, False])
def test_where_paligemmas_replies_see_their_later_tokens_it_is_said(share, method, tmp_path, caplog):
    trainer = make(method, tmp_path, "paligemma", images=(1, 1), share_prefix=share)
    batch = rollout(trainer, [0] * 4 + [1] * 4)
    logps = []
    for last in (60, 70):
        batch["completion_ids"][:, -1] = last
        with torch.no_grad():
            logps.append(log_probs(trainer, batch)[:, :-1])
    sees_later_tokens = not torch.allclose(*logps, rtol=0, atol=1e-5)
    said = "with the tokens after it in view" in caplog.text
    assert said == sees_later_tokens == (not share and method != "PPO")


@pytest.mark.parametrize("method", METHODS)
def test_without_sharing_nothing_is_hooked_in_and_with_one_reply_neither(method, tmp_path):
    options = {"num_generations": 1, "images": (1,) * 8} if method == "PPO" else {"share_prefix": False}
    trainer = make(method, tmp_path, **options)
    assert not trainer.shares_groups and not trainer.model.base_model._forward_pre_hooks
    assert GROUP not in rollout(trainer, [0] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_with_sharing_off_losses_and_weights_are_trls_to_the_last_digit(method, tmp_path):
    options = {"beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2, "images": (1, 2, 1, 1)}
    trainers = []
    for module, own in ((trl, {}), (trl_vlm, {"share_prefix": False})):
        trainers.append(make(method, tmp_path, module=module, **options, **own))
        trainers[-1].train()
    theirs, ours = trainers
    assert logged(theirs) == logged(ours) and logged(theirs)["loss"]
    for name, weight in weights(theirs).items():
        assert torch.equal(weights(ours)[name], weight), name


# Which rows stand beside each other


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_after_trls_shuffle_groups_stand_together_in_the_order_of_their_first_rows(family, tmp_path):
    options = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make("GRPO", tmp_path, family, images=(2, 2, 0, 0), **options)
    batch = rollout(trainer, [0, 0, 1, 1, 2, 2, 3, 3])
    torch.manual_seed(1)
    parts = shuffled({**batch, "place": torch.arange(8)}, 4)
    assert any(part[GROUP][0] != part[GROUP][1] for part in parts)
    shuffled_groups = torch.cat([part[GROUP] for part in parts]).tolist()
    sorted_parts = in_groups(parts)
    groups = torch.cat([part[GROUP] for part in sorted_parts]).tolist()
    assert groups == [group for group in dict.fromkeys(shuffled_groups) for _ in range(2)]
    trainer.shares_groups = False
    with torch.no_grad():
        wanted = log_probs(trainer, batch)
        for part in sorted_parts:
            assert_close(log_probs(trainer, part), wanted[part["place"]], rtol=1e-5, atol=2e-5)


def log_probs(trainer, batch):
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    images = {name: batch[name] for name in (*IMAGE_INPUTS, *TOKEN_TYPES) if name in batch}
    replies = batch["completion_ids"].size(1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, reply_ids(batch), mask, replies, **images)[0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, False),
        ({"loss_type": "grpo"}, False),
        ({"loss_type": "bnpo"}, True),
        ({"entropy_coef": 0.1}, True),
        ({"top_entropy_quantile": 0.5}, True),
    ],
)
def test_trls_shuffle_is_kept_where_a_loss_depends_on_micro_batches(options, kept, tmp_path):
    trainer = make("GRPO", tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    trainer.model.train()
    torch.manual_seed(0)
    trainer._prepare_inputs([trainer.train_dataset[row] for row in [0] * 4 + [1] * 4])
    together = [len(set(part[GROUP].tolist())) == 1 for part in trainer._buffered_inputs]
    assert together == [not kept] * 2


def test_every_pass_of_ppo_over_a_rollout_has_mini_batches_of_whole_groups(tmp_path):
    options = {"num_mini_batches": 2, "num_ppo_epochs": 2, "check_pixels": False, "kl_coef": 0.0}
    trainer = make("PPO", tmp_path, images=(1, 1), per_device_train_batch_size=4, **options)
    trainer.model.train()
    rows = [trainer.train_dataset[row] for row in [0] * 4 + [1] * 4]
    for trainer._step in range(4):
        served = trainer._prepare_inputs(rows)
        assert len(set(served[GROUP].tolist())) == 1
    assert {part[GROUP][0].item() for part in trainer._buffered_inputs} == {0, 1}


@pytest.mark.parametrize(("size", "said"), [(4, 0), (8, 0), (2, 1), (6, 1)])
def test_groups_that_micro_batches_cut_are_said_once(size, said, tmp_path, caplog):
    trainer = make("GRPO", tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=2)
    texts = [record.message for record in caplog.records if "holds no whole number of groups of 4" in record.message]
    assert trainer.shares_groups and len(texts) == said


# What is shared, and where it is not


@pytest.mark.parametrize("method", METHODS)
def test_an_image_goes_through_the_tower_once_for_all_replies_of_a_micro_batch(method, tmp_path):
    options = {"kl_coef": 0.0, "check_pixels": False, "share_base": False} if method == "PPO" else {"beta": 0.0}
    trainer = make(method, tmp_path, images=(1, 1), **options)
    batch = rollout(trainer, [0] * 4 + [1] * 4)
    towers = [count_tower_passes(trainer.model)]
    if method == "PPO":
        towers.append(count_tower_passes(trainer.value_model))
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        trainer._compute_loss(trainer.model, batch)
    assert towers == [[2 * 3 * 28 * 28]] * len(towers)


def test_replies_that_are_all_masked_are_read(tmp_path):
    """As `mask_truncated_completions` does it: then nothing stands behind the prompts."""
    trainer = make("GRPO", tmp_path, images=(1, 1))
    batch = rollout(trainer, [0] * 4 + [1] * 4)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    passes = count_passes(trainer.model)
    assert not log_probs(trainer, batch).any() and passes == [1]  # one packed sequence


def test_replies_that_hold_images_are_read_one_by_one(tmp_path):
    """As those of tools may: their images belong to one reply alone."""
    trainer = make("GRPO", tmp_path, images=(1, 1))
    batch = rollout(trainer, [0] * 4 + [1] * 4)
    seen = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs.get("pixel_values", ()))), with_kwargs=True
    )
    with torch.no_grad():
        log_probs(trainer, batch)
        batch["completion_ids"][3, -1] = trainer.model.config.image_token_id
        with pytest.raises(ValueError, match="[Ii]mage"):  # this one has no pixels
            log_probs(trainer, batch)
    assert seen == [2, 8]


def test_a_family_that_no_test_knows_is_tried_on_the_first_part_and_shares_if_it_can(tmp_path, monkeypatch):
    monkeypatch.delitem(KNOWN, "llava")
    trainer = make("GRPO", tmp_path, num_generations=2, per_device_train_batch_size=4)
    torch.manual_seed(0)
    (batch,) = shuffled(rollout(trainer, [0, 0, 1, 1]), 1)
    (hook,) = (
        hook for hook in trainer.model.base_model._forward_pre_hooks.values() if isinstance(hook, sharing._Pack)
    )
    trainer.shares_groups = False
    wanted = scored(trainer, batch)
    trainer.shares_groups = True
    assert hook.is_proven is None
    assert_scored_alike(scored(trainer, batch), wanted)
    assert hook.is_proven is True


def test_a_family_that_comes_out_differently_takes_the_plain_path(tmp_path, monkeypatch):
    monkeypatch.delitem(KNOWN, "llava")
    right = sharing._positions

    def wrong(backbone, slots, packed):
        return right(backbone, slots, packed) + (slots.source // slots.target.size(1) == 1)  # of one sequence

    monkeypatch.setattr(sharing, "_positions", wrong)
    trainer = make("GRPO", tmp_path, num_generations=2, per_device_train_batch_size=4)
    (batch,) = shuffled(rollout(trainer, [0, 0, 1, 1]), 1)
    trainer.shares_groups = False
    wanted = scored(trainer, batch)
    trainer.shares_groups = True
    for _ in range(2):
        assert_scored_alike(scored(trainer, batch), wanted)
