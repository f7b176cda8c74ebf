"""PPO's models: references, critics, adapters, what is frozen, and who may see whose parameters."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests import families
from tests.trainers.ppo.helpers import count_letters, lora, rollout, rows, settings
from trl_vlm import PPOTrainer
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.parts import part_of
from trl_vlm.models.reward_model import load_reward_model
from trl_vlm.rewards import RewardModelReward
from trl_vlm.rewards.reward_model import reward_models_in
from trl_vlm.trainers import adapters
from trl_vlm.trainers.ppo.rewards import load_options_of_rewards
from trl_vlm.trainers.preparation import loading_arguments_of_others

SHARP = 3.0


def folder(family="llava", **options):
    return str(families.saved(family, sharp=SHARP, **options))


def in_memory(seed=7):
    """A model that has been trained since it was loaded: its path holds other weights."""
    model = AutoModelForImageTextToText.from_pretrained(folder())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def ppo(tmp_path, model=None, *, images=(1, 1), peft_config=None, reward=count_letters, more=None, **options):
    return PPOTrainer(
        folder() if model is None else model,
        reward_funcs=reward,
        args=settings(tmp_path, **options),
        train_dataset=rows(list(images)),
        peft_config=peft_config,
        **(more or {}),
    )


def last(trainer, name):
    return trainer._metrics["train"][name][-1]


# References


def test_a_model_in_memory_is_its_own_reference_and_not_what_its_path_holds(tmp_path):
    trainer = ppo(tmp_path, in_memory())
    rollout(trainer, [0, 1])
    assert last(trainer, "ppo/kl") == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(torch.randn_like(trainer.model.lm_head.weight))
    rollout(trainer, [0, 1])
    assert abs(last(trainer, "ppo/kl")) > 0.1

    # A second run with the same object starts from what the first one has made of it.
    old_critic = weakref.ref(trainer.value_model)
    model = trainer.model
    del trainer
    again = ppo(tmp_path, model)
    gc.collect()
    assert old_critic() is None
    assert [name for name, _ in again.model.named_children()].count("value_model") == 1
    assert not any("value_model" in name for name, _ in again.ref_model.named_parameters())
    rollout(again, [0, 1])
    assert last(again, "ppo/kl") == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        again.model.lm_head.weight.add_(torch.randn_like(again.model.lm_head.weight))
    rollout(again, [0, 1])
    assert abs(last(again, "ppo/kl")) > 0.1


def test_the_reference_of_a_trained_adapter_is_that_adapter_and_not_the_bare_base(tmp_path):
    policy = get_peft_model(AutoModelForImageTextToText.from_pretrained(folder()), lora())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0), std=0.3)
    trainer = ppo(tmp_path, policy, freeze_vision_tower=True, share_base=False)
    batch = rollout(trainer, [0, 1])
    assert last(trainer, "ppo/kl") == pytest.approx(0, abs=1e-4)
    with torch.no_grad(), trainer.model.disable_adapter():
        bare = trainer._score_tokens(trainer.model, batch)
    assert (bare - batch["ref_per_token_logps"]).abs().max() > 0.1
    trainer.train()
    trained = {
        part_of(name) for name, p in trainer.model.named_parameters() if p.requires_grad and ".ref." not in name
    }
    assert trained == {"language model", "projector", "head"}
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if ".ref." in name)
    # The critic starts from the policy with its adapter merged in, and trains an adapter like the policy's.
    assert {name for name, p in trainer.value_model.named_parameters() if p.requires_grad and "lora" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }


def test_without_a_kl_penalty_there_is_no_reference(tmp_path):
    for model in (folder(), in_memory()):
        trainer = ppo(tmp_path, model, kl_coef=0.0)
        assert trainer.ref_model is None
        assert "ref_per_token_logps" not in rollout(trainer, [0, 1])
        assert last(trainer, "ppo/kl") == 0


# What trains


def test_the_critic_has_its_own_learning_rate(tmp_path):
    trainer = ppo(tmp_path, learning_rate=1e-3, value_learning_rate=5e-3)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(trainer.model.named_parameters())
    assert rates.keys() == {id(parameter) for parameter in parameters.values()}
    for name, parameter in parameters.items():
        assert rates[id(parameter)] == (5e-3 if name.startswith("value_model.") else 1e-3), name
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert len(decays) == 4 and decays[:2] == decays[2:]


@pytest.mark.parametrize("make_adapter", [lambda: None, lora], ids=["full", "lora"])
def test_a_frozen_vision_tower_stays_as_it_is_in_policy_and_critic(make_adapter, tmp_path):
    trainer = ppo(tmp_path, peft_config=make_adapter(), freeze_vision_tower=True, learning_rate=1e-2)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trained = {part_of(name) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert "vision tower" not in trained
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if part_of(name) == "vision tower":
            assert not parameter.requires_grad and parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name
    moved = {
        ("value_model" in name.split("."), part_of(name))
        for name, parameter in trainer.model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert {(False, "projector"), (True, "projector"), (False, "language model"), (True, "language model")} <= moved


# Critics


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward")
    _save_reward(load_reward_model(folder(seed=3)), path)
    return path


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(load_reward_model(folder(seed=3)), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0), std=0.3)
    _save_reward(model, path)
    return path


def _save_reward(model, path):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "score" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(path)
    families.load_processor("llava").save_pretrained(path)
    JudgeTemplate(request="Judge it.{facts}", opening="It is").save_pretrained(path)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_reward_model_scores_with_images_and_facts_and_starts_the_critic(
    kind, reward_folder, adapter_folder, tmp_path
):
    path = reward_folder if kind == "full" else adapter_folder
    adapter = None if kind == "full" else lora()
    trainer = ppo(tmp_path, reward=None, peft_config=adapter, more={"reward_model": str(path)}, images=(1, 2))
    batch = rollout(trainer, [0, 1])
    given = {"images": [trainer.train_dataset[i]["images"] for i in (0, 1)], "facts": [["a dog"]] * 2}
    given["images"] = [[families.image(10 * i + j, 40 + 10 * j, 30) for j in range(i + 1)] for i in (0, 1)]
    prompts = [trainer.train_dataset[i]["prompt"] for i in (0, 1)]
    replies = [
        [{"role": "assistant", "content": trainer.processing_class.tokenizer.decode(ids, skip_special_tokens=True)}]
        for ids in batch["completion_ids"]
    ]
    scorer = RewardModelReward(str(path))
    scores = scorer(prompts, replies, **given)
    assert scores != scorer(prompts, replies, **{**given, "facts": [["a red cat"]] * 2})
    assert last(trainer, "ppo/score") == pytest.approx(sum(scores) / 2, rel=1e-4)

    started = load_reward_model(path)
    critic = dict(trainer.value_model.named_parameters())
    for name, parameter in started.named_parameters():
        expected = torch.zeros_like(parameter) if "score" in name else parameter
        assert torch.equal(critic[name], expected), name
    head = [parameter for name, parameter in critic.items() if "score" in name and parameter.requires_grad]
    assert len(head) == 1 and not batch["old_values"].any()
    (scoring,) = reward_models_in(trainer.reward_funcs[0])
    assert not any(parameter.requires_grad for parameter in scoring.model.parameters())


def test_a_critic_may_keep_the_head_of_its_reward_model(reward_folder, adapter_folder, tmp_path):
    for path in (reward_folder, adapter_folder):
        trainer = ppo(tmp_path, more={"value_model": str(path)}, value_head_init="trained")
        batch = rollout(trainer, [0, 1])
        assert batch["old_values"].abs().min() > 0
        assert any(p.requires_grad for name, p in trainer.value_model.named_parameters() if "score" in name)


def test_a_reward_model_in_memory_is_copied_and_its_base_stays_frozen(adapter_folder, tmp_path):
    model = load_reward_model(adapter_folder, for_scoring=True)
    reward = RewardModelReward(model, processor=families.load_processor("llava"), template=JudgeTemplate.none())
    trainer = ppo(tmp_path, peft_config=lora(), reward=reward, more={"value_model": None})
    from trl_vlm.trainers.ppo.critic import make_critic

    critic = make_critic(
        trainer.model,
        value_model=None,
        reward_model=model,
        peft_config=None,
        args=trainer.args,
        load_options={},
    )
    trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.base_model.model.score.modules_to_save.default.weight.any()  # the reward keeps its head


@pytest.mark.parametrize("dtype, autocast", [("bfloat16", False), ("float32", True)], ids=["bfloat16", "autocast"])
def test_the_critics_head_is_kept_in_float32(dtype, autocast, tmp_path):
    trainer = ppo(tmp_path, model_init_kwargs={"dtype": dtype}, max_steps=1, bf16=autocast)
    assert trainer.value_model.score.weight.dtype == torch.float32
    assert trainer.value_model.model.dtype == getattr(torch, dtype)
    trainer.train()
    assert trainer.value_model.score.weight.any()
    assert rollout(trainer, [0, 1])["old_values"].dtype == torch.float32


def test_a_value_model_of_another_family_or_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="The value model is a gemma3 .* the policy a llava"):
        ppo(tmp_path, more={"value_model": folder("gemma3")})
    critic = load_reward_model(folder())
    critic.resize_token_embeddings(400)
    with pytest.raises(ValueError, match="a llava with 400 tokens, the policy a llava with"):
        ppo(tmp_path, more={"value_model": critic})


def test_vllm_never_sees_the_critic(tmp_path):
    trainer = ppo(tmp_path)
    seen = []
    trainer._without_critic(lambda: seen.extend(name for name, _ in trainer.model.named_parameters()))()
    assert seen and not any("value_model" in name for name in seen)
    assert any("value_model" in name for name, _ in trainer.model.named_parameters())


# Language models without images, and 4-bit weights


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    processor = families.load_processor("llava")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=processor.tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        chat_template=processor.chat_template,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("critic", ["from the policy", "from a folder"])
def test_a_language_model_trains_with_a_critic_of_its_own_kind(critic, text_folder, tmp_path):
    trainer = PPOTrainer(
        text_folder,
        reward_funcs=count_letters,
        args=settings(tmp_path, num_ppo_epochs=2, model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=rows([0, 0]).remove_columns("images"),
        value_model=text_folder if critic == "from a folder" else None,
    )
    assert type(trainer.value_model).__name__ == "LlamaForSequenceClassification"
    assert trainer.value_model.score.weight.dtype == torch.float32
    source = AutoModelForCausalLM.from_pretrained(text_folder, dtype="bfloat16")
    assert_close(trainer.value_model.model.state_dict(), source.model.state_dict())
    trainer.train()
    assert trainer.value_model.score.weight.any()


def test_a_4bit_policy_trains_with_a_4bit_critic(tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer = ppo(
        tmp_path,
        folder(width=64),
        peft_config=lora(),
        more={"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
        num_ppo_epochs=2,
        share_base=False,
        learning_rate=1e-2,
    )
    start = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for model in (trainer.model.get_base_model(), trainer.value_model.get_base_model()):
        assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    moved = {
        name.startswith("value_model.")
        for name, p in trainer.model.named_parameters()
        if name in start and not torch.equal(p, start[name])
    }
    assert moved == {True, False}


def test_a_policy_on_several_devices_is_refused_with_the_remedy(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folder())
    model.hf_device_map = {"model": "cuda:0", "lm_head": "cuda:1"}
    with pytest.raises(ValueError, match=r"lies on several devices \(cuda:0, cuda:1\).* `accelerate launch`"):
        ppo(tmp_path, model)


def test_a_named_reward_model_is_loaded_as_the_policy_is_but_from_its_own_repository(reward_folder, tmp_path):
    options = {"model_init_kwargs": {"dtype": "bfloat16", "revision": "main"}}
    trainer = ppo(tmp_path, reward=None, more={"reward_model": str(reward_folder)}, **options)
    model = reward_models_in(trainer.reward_funcs[0])[0].model
    assert model.model.dtype == torch.bfloat16 and model.score.weight.dtype == torch.float32
    others = loading_arguments_of_others(trainer.args)
    assert others == {"dtype": "bfloat16"}
    in_float32 = load_options_of_rewards(folder(), {}, None)
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    assert in_float32 == {"dtype": torch.float32}
    assert load_options_of_rewards(trainer.model, {}, quantization) == {
        "dtype": torch.bfloat16,
        "quantization_config": quantization,
    }


@pytest.mark.parametrize("sharded, wanted", [(False, torch.float32), (True, torch.bfloat16)])
def test_under_zero3_the_critics_adapter_has_the_models_precision(sharded, wanted, monkeypatch):
    """ZeRO-3 refuses a model of two precisions."""
    model = load_reward_model(folder(), dtype=torch.bfloat16)
    monkeypatch.setattr(adapters, "is_deepspeed_zero3_enabled", lambda: sharded)
    made = adapters.with_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert {p.dtype for name, p in made.named_parameters() if "lora_" in name} == {wanted}
