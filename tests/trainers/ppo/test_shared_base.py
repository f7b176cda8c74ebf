"""PPO on one base: what it trains and logs is what PPO with a model for each role does."""

import functools
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from tests import families
from tests.lora_models import lora_policy, reward_adapter
from tests.trainers.ppo.helpers import count_letters, lora, rollout, rows, settings
from trl_vlm import PPOTrainer
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.parts import number_of
from trl_vlm.models.reward_model import load_reward_model
from trl_vlm.rewards import FactRLHFReward, RewardModelReward
from trl_vlm.rewards.reward_model import reward_models_in
from trl_vlm.trainers.ppo.critics import OwnCritic, SharedCritic

pytestmark = pytest.mark.slow

SHARP = 3.0
CHECKPOINTING = {
    "none": {},
    "plain": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    @functools.cache
    def make(family="llava", **options):
        return reward_adapter(families.saved(family, sharp=SHARP), tmp_path_factory.mktemp(family), **options)

    return make


def ppo(folder, share, *, family="llava", model=None, more=None, **options):
    return PPOTrainer(
        str(families.saved(family, sharp=SHARP)) if model is None else model,
        args=settings(
            folder,
            **{
                "share_base": share,
                "num_ppo_epochs": 2,
                "learning_rate": 0.3,
                "optim": "sgd",  # Adam divides by the size of a gradient, and so makes much of rounding
                "kl_coef": 0.5,
                "vf_coef": 1.0,
                "shuffle_dataset": False,
                "generation_kwargs": {"do_sample": False},
                **options,
            },
        ),
        train_dataset=rows([1, 1, 1, 1] if family == "paligemma" else [1, 2, 0, 1]),
        **{"peft_config": lora() if model is None else None, **(more or {})},
    )


def own_weights(trainer):
    """What the policy and its critic train, by names that do not tell how the critic is held."""
    found = {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = "critic" if "value_model" in name else "policy"
        name = name.removeprefix("value_model.base_model.").removeprefix("base_model.").removeprefix("value_model.")
        name = name.replace(".value_model.", ".default.").replace("modules_to_save.default.", "")
        found[role, name.removeprefix("model.") if "score" in name else name] = parameter.detach().clone()
    return found


def assert_the_same_run(first, second, tolerance=1e-5):
    expected, found = own_weights(first), own_weights(second)
    assert found.keys() == expected.keys() and {role for role, _ in found} == {"policy", "critic"}
    for name, weight in expected.items():
        assert_close(found[name], weight, rtol=0, atol=tolerance, msg=str(name))
    logs = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (first, second)]
    assert len(logs[0]) == len(logs[1]) == first.args.max_steps
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "ppo/score", "ppo/kl", "ppo/value_mean", "ppo/value_loss"):
            if name in one:  # a rollout is logged at its first step
                assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name
    assert abs(logs[0][-2]["ppo/kl"]) > 1e-4 and logs[0][-2]["ppo/value_mean"] != 0


@pytest.mark.parametrize("family", families.FAMILIES)
def test_ten_steps_on_one_base_are_ten_steps_with_three_models(family, reward_folder, tmp_path):
    trainers = []
    for share in (False, True):
        trainer = ppo(tmp_path, share, family=family, more={"reward_model": reward_folder(family)}, max_steps=10)
        trainer.train()
        trainers.append(trainer)
    assert isinstance(trainers[0]._critic, OwnCritic) and isinstance(trainers[1]._critic, SharedCritic)
    assert_the_same_run(*trainers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "reentrant"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_checkpointing_of_both_kinds_makes_no_difference(family, kind, reward_folder, tmp_path):
    trainers = []
    for options in ({}, CHECKPOINTING[kind]):
        more = {"reward_model": reward_folder(family)}
        trainer = ppo(tmp_path, True, family=family, more=more, max_steps=4, freeze_vision_tower=True, **options)
        trainer.train()
        trainers.append(trainer)
    assert_the_same_run(*trainers)


def test_without_a_reward_adapter_the_critic_is_a_new_adapter(tmp_path):
    """Which is the critic that starts from the policy's own backbone."""
    trainers = []
    for share in (False, True):
        trainer = ppo(tmp_path, share, more={"reward_funcs": count_letters}, max_steps=4)
        trainer.train()
        trainers.append(trainer)
    assert isinstance(trainers[1]._critic, SharedCritic)
    assert_the_same_run(*trainers)


def test_a_policy_that_comes_with_an_adapter_is_its_reference_and_starts_its_critic(tmp_path):
    trainers = []
    for share in (False, True):
        policy = lora_policy(families.saved("llava", sharp=SHARP), std=0.3)
        trainer = ppo(tmp_path, share, model=policy, more={"reward_funcs": count_letters}, max_steps=4)
        first = rollout(trainer, [0, 1])
        trainers.append((trainer, first))
    own, shared = trainers
    assert_close(shared[1]["ref_per_token_logps"], own[1]["ref_per_token_logps"], rtol=1e-5, atol=1e-5)
    base = shared[0]._critic.shared_base
    assert base.reference == "ref"
    start = {name: weight.clone() for name, weight in base.adapter_state("value_model").items()}
    policy = {name: weight.clone() for name, weight in base.adapter_state("default").items()}
    assert all(torch.equal(start[name], policy[name]) for name in policy) and start.keys() == policy.keys()
    shared[0].train()
    moved = base.adapter_state("default"), base.adapter_state("value_model"), base.adapter_state("ref")
    assert [all(torch.equal(state[name], policy[name]) for name in policy) for state in moved] == [False, False, True]
    trained = {name for name, parameter in shared[0].model.named_parameters() if parameter.requires_grad}
    assert not any(".ref." in name for name in trained)


# What shares and what does not


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"peft_config": None}, "the policy has no LoRA adapter, so its base trains"),
        ({"peft_config": lora(use_dora=True)}, "of the policy, `use_dora=True` of its adapter is not tested"),
        (
            {"peft_config": lora(modules_to_save=["multi_modal_projector"], target_modules=["q_proj"])},
            "of the policy, its adapter trains multi_modal_projector in full",
        ),
        ({"reward_model": "whole"}, "the critic starts from .*, which is a whole model"),
        ({"reward_model": "elsewhere"}, "the critic starts from .*: its base is .*, the policy's"),
        ({"reward_model": "projector"}, "the critic starts from .*: its adapter trains multi_modal_projector in full"),
        ({"value_peft_config": lora(bias="all"), "reward_funcs": count_letters}, "of the critic, `bias='all'`"),
    ],
)
def test_what_cannot_share_has_models_of_its_own_and_is_refused_where_sharing_is_asked_for(
    more, reason, reward_folder, tmp_path, caplog
):
    kinds = {
        "whole": lambda: whole_reward_model(tmp_path / "whole"),
        "elsewhere": lambda: reward_adapter(families.saved("llava", sharp=2.0), tmp_path / "elsewhere"),
        "projector": lambda: reward_adapter(
            families.saved("llava", sharp=SHARP),
            tmp_path / "projector",
            modules_to_save=["score", "multi_modal_projector"],
            target_modules=["q_proj"],
        ),
    }
    more = dict(more)
    if "reward_model" in more:
        more["reward_model"] = kinds[more["reward_model"]]()
    elif "reward_funcs" not in more:
        more["reward_model"] = reward_folder()
    with caplog.at_level("INFO", "trl_vlm"):
        trainer = ppo(tmp_path / "run", None, more=more)
    assert isinstance(trainer._critic, OwnCritic)
    assert re.search(f"Not on the policy's base: {reason}", caplog.text)
    with pytest.raises(ValueError, match=f"`share_base=True` wants all models of the run .*{reason}"):
        ppo(tmp_path / "run", True, more=more)


def whole_reward_model(folder):
    load_reward_model(families.saved("llava", sharp=SHARP)).save_pretrained(folder)
    families.load_processor("llava").save_pretrained(folder)
    JudgeTemplate(request="Judge it.{facts}", opening="It is").save_pretrained(folder)
    return str(folder)


def test_a_policy_in_memory_shares_with_reward_adapters_only_when_asked_to(reward_folder, tmp_path, caplog):
    def policy():
        return AutoModelForImageTextToText.from_pretrained(families.saved("llava", sharp=SHARP))

    more = {"reward_model": reward_folder(), "peft_config": lora()}
    with caplog.at_level("INFO", "trl_vlm"):
        assert isinstance(ppo(tmp_path, None, model=policy(), more=more)._critic, OwnCritic)
    assert "whose weights need not be those of its folder" in caplog.text
    assert isinstance(ppo(tmp_path, True, model=policy(), more=more)._critic, SharedCritic)


def test_a_reward_model_on_another_base_scores_as_before_beside_a_critic_on_the_policys(tmp_path, caplog):
    other = reward_adapter(families.saved("llava", sharp=2.0), tmp_path / "reward")
    with caplog.at_level("INFO", "trl_vlm"):
        trainer = ppo(tmp_path / "run", None, more={"reward_funcs": RewardModelReward(other)}, max_steps=2)
    assert "has a base of its own: its base is" in caplog.text
    assert list(trainer._critic.shared_base.roles) == ["value_model"]
    trainer.train()
    scorer = RewardModelReward(other)
    reward_models_in(trainer.reward_funcs[0])[0].model.eval()
    completions = [[{"role": "assistant", "content": "a dog"}]]
    prompts = [[{"role": "user", "content": "What is it?"}]]
    assert trainer.reward_funcs[0](prompts, completions) == pytest.approx(scorer(prompts, completions), abs=1e-6)


def test_reward_models_inside_other_rewards_share_too_and_are_never_loaded(reward_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(RewardModelReward, "_load", lambda *args: pytest.fail("a whole reward model was loaded"))
    nested = FactRLHFReward(RewardModelReward(reward_folder(), name="inner"), eos_token_ids=2)
    second = RewardModelReward(reward_folder(seed=9), name="second")
    trainer = ppo(tmp_path, True, more={"reward_funcs": [nested, second], "value_model": reward_folder()})
    assert list(trainer._critic.shared_base.roles) == ["reward_model", "reward_model_2", "value_model"]
    batch = rollout(trainer, [0, 1])
    assert trainer._scores.shape == (2,) and not batch["old_values"].any()


def test_what_is_held_is_logged_as_a_table(reward_folder, tmp_path, caplog):
    with caplog.at_level("INFO", "trl_vlm"):
        trainer = ppo(tmp_path, True, more={"reward_model": reward_folder()})
    table = caplog.text[caplog.text.index("Weights held:") :]
    for role in ("base", "policy", "reference", "reward_model", "value_model", "in all"):
        assert re.search(rf"^{role} ", table, re.MULTILINE), role
    own = {name: sum(map(number_of, held)) for name, held in trainer._critic.shared_base.held().items()}
    assert sum(own.values()) == sum(map(number_of, trainer.model.parameters()))
    assert own["value_model"] == own["reward_model"] == own["policy"] + 32 and own["reference"] == 0


def test_the_critic_has_its_own_learning_rate_and_nothing_of_the_reward_model_trains(reward_folder, tmp_path):
    more = {"reward_model": reward_folder()}
    trainer = ppo(tmp_path, True, more=more, value_learning_rate=7e-3, optim="adamw_torch")
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in rates, name
        else:
            assert "reward_model" not in name
            assert rates[id(parameter)] == (7e-3 if "value_model" in name else 0.3), name


def test_a_second_run_with_the_same_policy_starts_with_new_roles(tmp_path):
    policy = lora_policy(families.saved("llava", sharp=SHARP))
    first = ppo(tmp_path, True, model=policy, more={"reward_funcs": count_letters}, kl_coef=0.0)
    first.train()
    again = ppo(tmp_path, True, model=first.model, more={"reward_funcs": count_letters}, kl_coef=0.0)
    assert again.value_model is not first.value_model
    assert sorted(again.model.peft_config) == ["default", "value_model"]
    again.train()
    assert again.value_model.score.weight.any()


def test_vllm_gets_the_policy_alone(reward_folder, tmp_path):
    trainer = ppo(tmp_path, True, more={"reward_model": reward_folder()})
    children = []
    trainer._without_critic(lambda: children.extend(name for name, _ in trainer.model.named_children()))()
    assert children == ["base_model"]
    assert [name for name, _ in trainer.model.named_children()] == ["base_model", "reward_model", "value_model"]
    assert trainer.model.active_adapters == ["default"]


def test_4bit_roles_stand_on_one_4bit_base(reward_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = families.saved("llava", sharp=SHARP, width=64)
    reward = reward_adapter(base, tmp_path / "reward")
    trainers = []
    for options in ({}, CHECKPOINTING["plain"]):
        more = {"reward_model": reward, "quantization_config": four, "peft_config": lora()}
        trainer = ppo(tmp_path / "run", True, model=str(base), more=more, max_steps=4, **options)
        trainer.train()
        trainers.append(trainer)
    layers = [m for m in trainers[0].model.modules() if type(m).__module__.startswith("bitsandbytes")]
    own = {id(parameter) for held in trainers[0]._critic.shared_base.held().values() for parameter in held}
    assert len(layers) > 10 and {id(layer.weight) for layer in layers} < own
    assert_the_same_run(*trainers)
    with pytest.raises(ValueError, match="it is loaded without quantization, the policy as "):
        more = {"reward_funcs": RewardModelReward(reward), "quantization_config": four, "peft_config": lora()}
        ppo(tmp_path / "run", True, model=str(base), more=more)
