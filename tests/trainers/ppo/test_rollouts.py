"""What a PPO rollout holds, and what the losses make of it, against slow definitions on plain models."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from tests import families
from tests.trainers.ppo.helpers import (
    count_letters,
    gae_by_definition,
    lora,
    reply_ids,
    rollout,
    rows,
    settings,
)
from trl_vlm import PPOTrainer
from trl_vlm.models.reward_model import load_reward_model

IMAGES = [1, 2, 1, 1]
ENDS = list(range(60, 120))  # so that some replies end early and some do not


def generative(seed=0):
    return AutoModelForImageTextToText.from_pretrained(families.saved("llava", seed=seed, sharp=6.0))


def critic():
    model = load_reward_model(families.saved("llava", seed=2, sharp=6.0))
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Policy, reference and critic are three different models."""
    policy = generative()
    policy.generation_config.eos_token_id = ENDS
    return PPOTrainer(
        policy,
        reward_funcs=count_letters,
        args=settings(
            tmp_path_factory.mktemp("out"),
            per_device_train_batch_size=4,
            max_completion_length=6,
            kl_coef=0.3,
            gamma=0.9,
            lam=0.8,
            vf_coef=0.7,
            missing_eos_penalty=2.5,
        ),
        train_dataset=rows(IMAGES),
        ref_model=generative(seed=1),
        value_model=critic(),
    )


@pytest.fixture(scope="module")
def plain_models():
    return generative().eval(), generative(seed=1).eval(), critic().eval()


@torch.no_grad()
def by_definition(batch, numbers, plain_models, processor, *, estimator):
    """The rollout again: one unpadded row at a time, full logits, loops over tokens."""
    policy, reference, critic = plain_models
    found = []
    for row, number in enumerate(numbers):
        ids, start, length = reply_ids(batch, row)
        pictures = [families.image(10 * number + place, 40 + 10 * place, 30) for place in range(IMAGES[number])]
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"],
        }
        logps, reference_logps = (
            [model(**inputs).logits[0, start + t - 1].log_softmax(-1)[ids[0, start + t]].item() for t in range(length)]
            for model in (policy, reference)
        )
        scores = critic(**inputs, output_token_scores=True).token_scores[0]
        values = [scores[start + t - 1].item() for t in range(length)]
        differences = [p - r for p, r in zip(logps, reference_logps, strict=True)]
        kl = {
            "k1": differences,
            "k3": [math.exp(-d) - 1 + d for d in differences],
            "clamped_k1": [max(d, 0.0) for d in differences],
        }[estimator]
        score = len(processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True))
        ended = any(token in [*ENDS, processor.tokenizer.eos_token_id] for token in ids[0, start:].tolist())
        rewards = [-0.3 * each for each in kl]
        rewards[-1] += score - (0 if ended else 2.5)
        advantages = gae_by_definition(rewards, values, 0.9, 0.8)
        found.append(
            {
                "logps": logps,
                "reference_logps": reference_logps,
                "values": values,
                "advantages": advantages,
                "returns": [a + v for a, v in zip(advantages, values, strict=True)],
                "kl": sum(kl),
                "score": score - (0 if ended else 2.5),
                "ended": ended,
            }
        )
    return found


@pytest.mark.parametrize("estimator", ["k1", "k3", "clamped_k1"])
def test_a_rollout_equals_its_definition(estimator, trainer, plain_models):
    trainer.args.kl_estimator = estimator
    trainer._metrics["train"].clear()
    numbers = [0, 1, 2, 3]
    for _ in range(20):  # until some replies have ended and some have not
        batch = rollout(trainer, numbers)
        expected = by_definition(batch, numbers, plain_models, trainer.processing_class, estimator=estimator)
        if {row["ended"] for row in expected} == {True, False}:
            break
    else:
        pytest.fail("replies all end or all do not")
    assert not batch["prompt_mask"].all()  # prompts of different lengths

    every_advantage = torch.tensor([a for row in expected for a in row["advantages"]], dtype=torch.float64)
    mean, deviation = every_advantage.mean(), every_advantage.std(unbiased=False)
    for index, row in enumerate(expected):
        mask = batch["completion_mask"][index].bool()
        for name, key in (
            ("old_per_token_logps", "logps"),
            ("ref_per_token_logps", "reference_logps"),
            ("old_values", "values"),
            ("returns", "returns"),
        ):
            assert_close(
                batch[name][index][mask].tolist(), row[key], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
            )
        whitened = (torch.tensor(row["advantages"], dtype=torch.float64) - mean) / deviation
        assert_close(batch["advantages"][index][mask].double(), whitened, rtol=1e-4, atol=1e-4)
        assert not batch["advantages"][index][~mask].any() and not batch["returns"][index][~mask].any()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["ppo/score"] == pytest.approx(sum(row["score"] for row in expected) / 4)
    assert metrics["ppo/kl"] == pytest.approx(sum(row["kl"] for row in expected) / 4, rel=1e-4)
    assert metrics["ppo/kl_coef"] == 0.3
    returns, values = (
        torch.tensor([x for row in expected for x in row[key]], dtype=torch.float64) for key in ("returns", "values")
    )
    assert metrics["ppo/return_mean"] == pytest.approx(returns.mean().item(), rel=1e-4)
    assert metrics["ppo/value_mean"] == pytest.approx(values.mean().item(), rel=1e-3, abs=1e-4)
    unexplained = (returns - values).square().mean() / returns.var(unbiased=False)
    assert metrics["ppo/explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-3)


def test_the_losses_equal_their_definition_after_the_policy_has_moved(trainer):
    batch = rollout(trainer, [0, 1, 2, 3])
    trainer.current_gradient_accumulation_steps = 1
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter))
    loss = trainer.compute_loss(trainer.model, batch).item()
    with torch.no_grad():
        logps = trainer._score_tokens(trainer.model, batch)
        values = torch.stack([_values(trainer, batch, row) for row in range(4)])
    total, tokens, clipped_ratios, clipped_values = 0.0, 0, 0, 0
    for row, t in batch["completion_mask"].nonzero().tolist():
        ratio = math.exp(logps[row, t] - batch["old_per_token_logps"][row, t])
        advantage = batch["advantages"][row, t].item()
        kept = min(max(ratio, 0.8), 1.2)
        total -= min(ratio * advantage, kept * advantage)
        clipped_ratios += ratio != kept
        old, goal, value = (x[row, t].item() for x in (batch["old_values"], batch["returns"], values))
        near = min(max(value, old - 0.2), old + 0.2)
        total += 0.7 * 0.5 * max((value - goal) ** 2, (near - goal) ** 2)
        clipped_values += (near - goal) ** 2 > (value - goal) ** 2
        tokens += 1
    assert clipped_ratios and clipped_values  # else this would not test the clipping
    # The KL penalty is in the reward: TRL's own, weighed by `beta`, must not be in the loss as well.
    assert trainer.beta == 0.3
    assert loss == pytest.approx(total / tokens, rel=1e-4)
    fraction = trainer._metrics["train"]["ppo/value_clip_fraction"][-1]
    assert fraction == pytest.approx(clipped_values / tokens)
    trainer.model.load_state_dict(before)


def _values(trainer, batch, row):
    """The critic's values of a row, read from its public output, padded to (T,)."""
    ids, start, length = reply_ids(batch, row)
    images = batch["num_images"]
    pixels = batch["pixel_values"][sum(images[:row]) : sum(images[: row + 1])]
    scores = trainer.value_model(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_token_scores=True
    ).token_scores[0]
    padded = torch.zeros(batch["completion_ids"].shape[1])
    padded[:length] = scores[start - 1 : start - 1 + length]
    return padded


def test_facts_reach_the_reward_and_neither_the_policy_nor_the_critic(tmp_path):
    """Also several epochs over several mini-batches of a group per prompt, with an evaluation in between."""
    seen = []

    def reward(completions, facts, **columns):
        seen.extend(facts)
        return count_letters(completions)

    processor = families.load_processor("llava")
    facts = "ÿÿþþ"
    secret = set(processor.tokenizer(facts, add_special_tokens=False)["input_ids"])
    prompts = processor.tokenizer("What is in the image? Describe it. user assistant system")["input_ids"]
    assert secret and not secret & set(prompts)
    trainer = PPOTrainer(
        str(families.saved("llava", sharp=6.0)),
        reward_funcs=reward,
        args=settings(
            tmp_path,
            num_generations=2,
            num_mini_batches=2,
            num_ppo_epochs=2,
            max_steps=8,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=4,
            kl_target=0.01,
            kl_horizon=10,
            # Neither an image nor, by chance, a token of the facts may be sampled.
            generation_kwargs={"suppress_tokens": [processor.tokenizer.image_token_id, *secret]},
        ),
        train_dataset=rows([1, 2, 1, 1], facts),
        eval_dataset=rows([1, 1], facts),
    )
    tokens = {"policy": [], "critic": []}
    embeddings = {"policy": trainer.model.get_input_embeddings(), "critic": trainer.value_model.get_input_embeddings()}
    for name, embedding in embeddings.items():
        embedding.register_forward_hook(
            lambda _, inputs, __, name=name: tokens[name].extend(inputs[0].unique().tolist())
        )
    trainer.train()
    assert set(map(tuple, seen)) == {(facts,)}
    assert set(tokens["policy"]) & set(prompts) and set(tokens["critic"]) & set(prompts)
    assert not secret & set(tokens["policy"]) and not secret & set(tokens["critic"])

    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 8
    assert logs[0]["clip_ratio/region_mean"] == 0  # the first mini-batch is on policy
    assert any(log["clip_ratio/region_mean"] > 0 for log in logs[1:4])  # the later ones are not
    # Two rollouts of four steps each: the second one is further from the reference than the target.
    assert [("ppo/kl" in log) for log in logs] == [True, False, False, False] * 2
    assert logs[0]["ppo/kl_coef"] == 0.05 and logs[4]["ppo/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 4 / 10))
    assert logs[4]["ppo/kl"] > 0.01
    assert trainer.kl_coef == pytest.approx(logs[4]["ppo/kl_coef"] * (1 + 0.2 * 4 / 10))
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 2 and all(math.isfinite(log["eval_ppo/score"]) for log in evaluations)


def test_no_later_token_of_a_reply_changes_paligemmas_log_probabilities(tmp_path):
    trainer = PPOTrainer(
        str(families.saved("paligemma", sharp=6.0)),
        reward_funcs=count_letters,
        args=settings(tmp_path, max_completion_length=6),
        train_dataset=rows([1, 1]),
    )
    batch = rollout(trainer, [0, 1])
    other = {**batch, "completion_ids": batch["completion_ids"].clone()}
    other["completion_ids"][:, -1] = 70
    assert (other["completion_ids"] != batch["completion_ids"]).any(dim=1).all()
    with torch.no_grad():
        logps, other_logps = (trainer._score_tokens(trainer.model, each) for each in (batch, other))
    assert_close(logps[:, :-1], other_logps[:, :-1], rtol=0, atol=1e-6)
    assert (logps[:, -1] != other_logps[:, -1]).all()


@pytest.mark.parametrize("images", [[0, 0, 0, 0], [0, 1, 2, 0], [1, 0, 0, 0]], ids=["no images", "mixed", "one"])
def test_rows_may_have_no_images(images, tmp_path):
    trainer = PPOTrainer(
        str(families.saved("llava", sharp=6.0)),
        reward_funcs=count_letters,
        args=settings(tmp_path, per_device_train_batch_size=1, num_mini_batches=4, max_steps=4),
        train_dataset=rows(images),
    )
    trainer.train()
    assert all(math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in trainer.state.log_history[:4])
    assert trainer._pixels_checked == any(images)  # rows without images cannot tell


@pytest.mark.parametrize("make_adapter", [lambda: None, lora], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_loss(make_adapter, tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer = PPOTrainer(
            str(families.saved("llava", sharp=3.0)),
            reward_funcs=count_letters,
            args=settings(tmp_path, gradient_checkpointing=checkpointing, num_ppo_epochs=2, learning_rate=1e-2),
            train_dataset=rows([1, 1]),
            peft_config=make_adapter(),
        )
        trainer.train()
        losses.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history[:2]])
    assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_a_model_that_is_blind_to_its_images_is_refused_before_the_first_step(tmp_path):
    model, processor = families.build("gemma3", sharp=6.0)
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.zero_()
    trainer = PPOTrainer(
        model,
        reward_funcs=count_letters,
        args=settings(tmp_path),
        train_dataset=rows([1, 1]),
        processing_class=processor,
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(RuntimeError, match="log-probabilities do not depend on the pixels"):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    trainer._pixels_checked = True  # what `check_pixels=False` sets
    assert "returns" in rollout(trainer, [0, 1])
