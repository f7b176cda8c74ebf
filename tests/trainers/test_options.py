"""One table of options through every trainer: what they all do, they do in the same way."""

import dataclasses
import inspect

import pytest
import trl
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig, TrainingArguments

import trl_vlm
from tests.families import build, load_processor, saved
from tests.preference_rows import preference_rows
from tests.trainers.ppo.helpers import count_letters
from tests.trainers.ppo.helpers import rows as prompt_rows
from trl_vlm.models.parts import part_of
from trl_vlm.models.reply_ends import with_reply_ends

METHODS = ("DPO", "Reward", "PPO", "SFT", "GRPO", "RLOO")
ROLLOUTS = ("PPO", "GRPO", "RLOO")
THEIRS = {method: getattr(trl, f"{'GRPO' if method == 'PPO' else method}Config") for method in METHODS}
POSITIONS = {method: getattr(trl, f"{'GRPO' if method == 'PPO' else method}Trainer") for method in METHODS}
FAMILIES = ("llava", "qwen2_5_vl")
VISION, PROJECTOR, LANGUAGE = "vision tower", "projector", "language model"
EVERY = {VISION, PROJECTOR, LANGUAGE}


def settings(method, folder, config=None, **options):
    few = {"max_completion_length": 4, "num_generations": 2} if method in ROLLOUTS else {}
    return (config or getattr(trl_vlm, f"{method}Config"))(
        str(folder),
        **few,
        per_device_train_batch_size=2,
        **{"max_steps": 1, "learning_rate": 1e-3, "use_cpu": True, "bf16": False, "report_to": "none", **options},
        save_strategy="no",
    )


def data(method):
    if method in ROLLOUTS:
        return prompt_rows([1, 1])
    pairs = preference_rows([1, 1]).remove_columns(["facts", "margin"])
    return pairs.rename_column("chosen", "completion").remove_columns("rejected") if method == "SFT" else pairs


def make(method, folder, family="llava", *, args=None, width=32, model=None, trainer=None, **options):
    """A trainer of the method; `trainer` are arguments of its constructor, `options` of its configuration."""
    more = {"reward_funcs": count_letters} if method in ROLLOUTS else {}
    return getattr(trl_vlm, f"{method}Trainer")(
        str(saved(family, sharp=4.0, width=width)) if model is None else model,
        args=settings(method, folder, **options) if args is None else args,
        **{"train_dataset": data(method), **more, **(trainer or {})},
    )


def models(trainer):
    """Every model that the trainer trains: PPO's critic is a child of its policy."""
    if not hasattr(trainer, "value_model"):
        return [dict(trainer.model.named_parameters())]
    named = dict(trainer.model.named_parameters())
    is_critic = {name: "value_model" in name.split(".") for name in named}
    return [{name: p for name, p in named.items() if is_critic[name] == which} for which in (False, True)]


def trainable(trainer):
    """The parts that train, without heads: a policy's is tied or spared by LoRA, a reward model's always trains."""
    parts = [{part_of(name) for name, p in named.items() if p.requires_grad} - {"head"} for named in models(trainer)]
    assert all(one == parts[0] for one in parts), parts
    return parts[0]


def adapted(trainer):
    return {part_of(name) for named in models(trainer) for name in named if "lora_" in name}


def lora(targets, **options):
    return LoraConfig(r=4, target_modules=targets, **options)


TABLE = {
    "full": ({}, None, EVERY),
    "frozen": ({"freeze_vision_tower": True}, None, EVERY - {VISION}),
    "a list": ({}, ["q_proj"], {VISION, LANGUAGE}),
    "a list, frozen": ({"freeze_vision_tower": True}, ["q_proj"], {LANGUAGE}),
    "all-linear": ({}, "all-linear", EVERY),
    "all-linear, frozen": ({"freeze_vision_tower": True}, "all-linear", {PROJECTOR, LANGUAGE}),
    "language-model": ({}, "language-model", {LANGUAGE}),
    "language-model, as a command line passes it": ({}, ["language-model"], {LANGUAGE}),
    "language-model-and-projector": ({}, "language-model-and-projector", {PROJECTOR, LANGUAGE}),
    "preset, frozen": ({"freeze_vision_tower": True}, "language-model-and-projector", {PROJECTOR, LANGUAGE}),
}


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_options_train_the_same_parts(method, family, row, tmp_path):
    options, targets, wanted = TABLE[row]
    if family == "qwen2_5_vl" and isinstance(targets, list) and "q_proj" in targets:
        wanted = {LANGUAGE}  # its tower has one layer for queries, keys and values
    peft_config = None if targets is None else lora(targets)
    trainer = make(method, tmp_path, family, trainer={"peft_config": peft_config}, **options)
    assert trainable(trainer) == wanted
    if peft_config is not None:
        assert adapted(trainer) == wanted  # no adapter that cannot train
        assert peft_config.target_modules in (targets, set(targets))  # the user's stays as it is


@pytest.mark.parametrize("method", METHODS)
def test_a_4bit_model_trains_the_same_parts_with_every_method(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    more = {"quantization_config": quantization, "peft_config": lora("language-model-and-projector")}
    trainer = make(method, tmp_path, width=64, trainer=more, freeze_vision_tower=True)
    assert trainable(trainer) == adapted(trainer) == {PROJECTOR, LANGUAGE}
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_the_projector_has_a_rate_of_its_own_in_every_trainer(method, tmp_path):
    trainer = make(method, tmp_path, projector_learning_rate=5e-2)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for named in models(trainer):
        for name, parameter in named.items():
            assert rates[id(parameter)] == (5e-2 if part_of(name) == PROJECTOR else 1e-3), name


def test_the_critics_rate_goes_before_the_projectors(tmp_path):
    trainer = make("PPO", tmp_path, projector_learning_rate=5e-2, value_learning_rate=7e-3)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    policy, critic = models(trainer)
    assert {rates[id(p)] for p in critic.values()} == {7e-3}
    assert {rates[id(p)] for name, p in policy.items() if part_of(name) == PROJECTOR} == {5e-2}


@pytest.mark.parametrize("family", ["gemma3"])
def test_a_preset_says_when_it_adds_nothing_to_the_projector(family, tmp_path, caplog):
    trainer = make("DPO", tmp_path, family, trainer={"peft_config": lora("language-model-and-projector")})
    assert adapted(trainer) == {LANGUAGE}
    assert "adds no adapter to the projector of Gemma3ForConditionalGeneration" in caplog.text
    assert "`modules_to_save`" in caplog.text


# Configurations


@pytest.mark.parametrize("method", METHODS)
def test_trls_own_configuration_is_taken_with_every_value_that_it_has(method, tmp_path):
    given = settings(
        method,
        tmp_path,
        THEIRS[method],
        lr_scheduler_type="cosine",
        warmup_steps=3,
        logging_steps=0.5,
        seed=7,
        accelerator_config={"split_batches": False},
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    before, theirs = dict(vars(given)), type(given)
    trainer = make(method, tmp_path, args=given)
    ours = trainer.args
    assert type(ours) is getattr(trl_vlm, f"{method}Config") and type(given) is theirs
    # `log_multimodal` gathers images for a log that is off.
    set_by_trainer = {"ddp_find_unused_parameters", "beta", "log_multimodal"}
    for name in before.keys() - set_by_trainer:
        assert getattr(ours, name) == before[name], name
        assert getattr(given, name) is before[name], name
    own = {field.name: field for field in dataclasses.fields(ours)}.keys() - before.keys()
    assert {"freeze_vision_tower", "projector_learning_rate"} <= own
    defaults = settings(method, tmp_path)
    for name in own - {"beta"}:
        assert getattr(ours, name) == getattr(defaults, name), name


def test_trls_configuration_trains_dpo_as_ours_does(tmp_path):
    losses = []
    for config in (trl.DPOConfig, trl_vlm.DPOConfig):
        args = settings("DPO", tmp_path, config, logging_steps=1, beta=0.3, max_length=None)
        trainer = make("DPO", tmp_path, args=args)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert trainer.args.beta == 0.3
    assert losses[0] == losses[1]


def test_a_configuration_of_another_method_is_refused_with_the_right_one(tmp_path):
    with pytest.raises(TypeError, match="`args` is a trl.* Use `trl_vlm.PPOConfig`.* of `trl.GRPOConfig`"):
        make("PPO", tmp_path, args=settings("DPO", tmp_path, trl.DPOConfig))


def test_sft_takes_arguments_of_transformers_own_trainer_as_trl_does_and_no_others(tmp_path):
    plain = settings("SFT", tmp_path, TrainingArguments, logging_steps=1, max_steps=2, hub_token="secret")
    losses = []
    for kind in (trl_vlm.SFTTrainer, trl.SFTTrainer):
        processor = load_processor("qwen2_5_vl")
        model = str(saved("qwen2_5_vl", sharp=4.0))
        trainer = kind(model, args=plain, train_dataset=data("SFT"), processing_class=processor)
        trainer.train()
        assert trainer.args.hub_token == "secret"
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    with pytest.raises(TypeError, match="`args` is a trl.*DPOConfig. Use `trl_vlm.SFTConfig`"):
        make("SFT", tmp_path, args=settings("DPO", tmp_path, trl.DPOConfig))


def test_a_grpo_configuration_with_a_kl_loss_is_refused_by_ppo(tmp_path):
    with pytest.raises(ValueError, match="`beta` is 0.1.* set `kl_coef` instead"):
        make("PPO", tmp_path, args=settings("PPO", tmp_path, trl.GRPOConfig, beta=0.1))


@pytest.mark.parametrize("method", METHODS)
def test_without_arguments_the_name_is_that_of_the_model_and_the_method(method, monkeypatch):
    from trl_vlm.trainers import preparation

    config = getattr(trl_vlm, f"{method}Config")
    monkeypatch.setattr(config, "__post_init__", lambda self: None)
    model, _ = build("llava")
    model.config._name_or_path = ""
    assert preparation.complete_arguments(None, "org/some-model/", config).output_dir == f"some-model-{method}"
    made = preparation.complete_arguments(None, model, config).output_dir
    assert made == f"LlavaForConditionalGeneration-{method}"


BELOW_ZERO = [(method, "projector_learning_rate") for method in METHODS]
BELOW_ZERO += [("PPO", option) for option in ("value_learning_rate", "vf_coef", "epsilon")]


@pytest.mark.parametrize("method, option", BELOW_ZERO)
def test_a_rate_or_weight_below_zero_is_refused(method, option, tmp_path):
    with pytest.raises(ValueError, match=f"`{option}` is -0.1; it must not be negative"):
        settings(method, tmp_path, **{option: -0.1})


# Constructors


@pytest.mark.parametrize("method", METHODS)
def test_the_constructor_takes_trls_arguments_in_trls_order(method):
    theirs = list(inspect.signature(POSITIONS[method].__init__).parameters.values())
    ours = list(inspect.signature(getattr(trl_vlm, f"{method}Trainer").__init__).parameters.values())
    assert [one.name for one in ours[: len(theirs)]] == [one.name for one in theirs]
    assert [one.default for one in ours[: len(theirs)]] == [one.default for one in theirs]
    assert all(one.kind in (one.KEYWORD_ONLY, one.VAR_KEYWORD) for one in ours[len(theirs) :])


def test_arguments_may_be_positional(tmp_path):
    seen = []

    def scored(prediction):
        seen.append(prediction.predictions.shape)
        return {"mine": 1.0}

    rows = data("Reward")
    args = settings("Reward", tmp_path, trl.RewardConfig)
    model = str(saved("llava", sharp=4.0))
    trainer = trl_vlm.RewardTrainer(model, args, None, rows, rows, load_processor("llava"), scored)
    assert trainer.evaluate()["eval_mine"] == 1.0 and seen == [(2, 2)]


# Models in memory


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_a_path_is_refused_with_the_remedy(method, tmp_path):
    model, processor = build("llava")
    if method == "Reward":
        from trl_vlm.models.reward_model import load_reward_model

        model = load_reward_model(saved("llava"))
    model.config._name_or_path = ""
    more = {"peft_config": lora("language-model")}  # the reference is then the base
    with pytest.raises(ValueError, match="made in memory, so its processor is unknown. Pass it as `processing_class`"):
        make(method, tmp_path, model=model, trainer=more)
    trainer = make(method, tmp_path, model=model, trainer={**more, "processing_class": processor})
    assert trainable(trainer) == {LANGUAGE}


def test_dpo_on_a_model_without_a_path_names_the_ways_to_a_reference(tmp_path):
    model, processor = build("llava")
    with pytest.raises(ValueError, match=r"its reference cannot be loaded. Pass `ref_model=copy.deepcopy\(model\)`"):
        make("DPO", tmp_path, model=model, trainer={"processing_class": processor})
    other, _ = build("llava")
    assert isinstance(
        make("DPO", tmp_path, model=model, trainer={"processing_class": processor, "ref_model": other}).model,
        nn.Module,
    )


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_a_reference_for_a_model_without_a_path_is_refused_with_the_remedy(method, tmp_path):
    model, processor = build("llava")
    own = {"processing_class": processor}
    with pytest.raises(ValueError, match=r"reference cannot be loaded. Set `beta=0`.* or save the model with its"):
        make(method, tmp_path, model=model, trainer=own, beta=0.05)
    assert make(method, tmp_path, model=model, trainer=own, beta=0.0).ref_model is None
    with_adapter = {**own, "peft_config": lora("language-model")}
    assert make(method, tmp_path, model=model, trainer=with_adapter, beta=0.05).ref_model is None


# Where files come from


@pytest.mark.parametrize("method", METHODS)
def test_the_processor_comes_from_where_the_weights_come(method, tmp_path, monkeypatch):
    """`model_init_kwargs` names a version of the repository; a processor of another one fits by luck alone."""
    from trl_vlm.trainers import preparation

    seen = {}

    def load(source, **options):
        seen.update(options)
        return load_processor("llava")

    monkeypatch.setattr(preparation, "load_processor", load)
    where = {"revision": "main", "cache_dir": str(tmp_path / "cache"), "token": False}
    make(method, tmp_path, model_init_kwargs=where)
    assert {name: seen[name] for name in where} == where


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["SFT", "GRPO", "RLOO"])
def test_with_nothing_of_ours_set_the_losses_are_trls(method, family, tmp_path):
    losses, model = [], str(saved(family, sharp=4.0))
    processor = with_reply_ends(load_processor(model))  # of LLaVA-1.5, TRL would train replies without an end
    for module in (trl, trl_vlm):
        config = getattr(module, f"{method}Config")
        # With it, losses are equal up to rounding: test_group_sharing.py.
        own = {"share_prefix": False} if module is trl_vlm and method in ROLLOUTS else {}
        args = settings(method, tmp_path, config, max_steps=3, logging_steps=1, **own)
        more = {"reward_funcs": count_letters} if method in ROLLOUTS else {}
        trainer = getattr(module, f"{method}Trainer")(
            model, args=args, train_dataset=data(method), processing_class=processor, **more
        )
        trainer.train()
        names = ("loss", "grad_norm")
        losses.append([[log[name] for name in names] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 3 and losses[0] == losses[1]
