"""Rewards of single tokens: from a reward function to the targets of the losses."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks.studies import ppo_claims
from tests import families
from tests.distributed import launch
from tests.trainers.ppo.distributed_main import REPORTED, main
from tests.trainers.ppo.helpers import (
    count_letters,
    gae_by_definition,
    lora,
    reward_each_token,
    rollout,
    rows,
    settings,
)
from trl_vlm import PPOTrainer
from trl_vlm.maths.advantages import generalized_advantages, shaped_rewards
from trl_vlm.rewards import ClaimReward

ENDS = list(range(60, 120))  # so that some replies end early and some do not


def at_the_end(completion_ids, **columns):
    return [
        [0.0] * (len(ids) - 1) + [total] for ids, total in zip(completion_ids, totals(completion_ids), strict=True)
    ]


def totals(completion_ids, **columns):
    return [sum(found) for found in reward_each_token(completion_ids)]


def make(folder, reward_funcs, **options):
    model = families.build("llava", sharp=6.0)[0]
    model.generation_config.eos_token_id = ENDS
    return PPOTrainer(
        model,
        reward_funcs=reward_funcs,
        args=settings(
            folder,
            **{
                "per_device_train_batch_size": 4,
                "max_completion_length": 6,
                "kl_coef": 0.3,
                "gamma": 0.9,
                "lam": 0.8,
                "value_head_init": "zero",
                "missing_eos_penalty": 2.5,
                **options,
            },
        ),
        train_dataset=rows([1, 2, 1, 1]),
        processing_class=families.load_processor("llava"),
    )


def test_advantages_of_rewards_within_a_reply_by_hand():
    """Two claims of a reply of four tokens end at the second and the last one; values are known."""
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    parts = torch.tensor([[0.0, 1.0, 0.0, -2.0, 7.0]])
    kl = torch.tensor([[1.0, 0.0, 0.0, 2.0, 9.0]])
    rewards = shaped_rewards(torch.tensor([-1.5]), kl, mask, 0.1, parts)
    # The parts on real tokens are 1 - 2 = -1; the other -0.5 of the score lies on the last token.
    assert_close(rewards, torch.tensor([[-0.1, 1.0, 0.0, -2.7, 0.0]]))
    values = torch.tensor([[0.5, 0.25, -1.0, -2.0, 5.0]])
    found = generalized_advantages(rewards, values, mask, gamma=1.0, lam=0.5)
    # delta = r + V' - V: -0.35, -0.25, -1.0, -0.7; A_t = delta_t + A_{t+1} / 2
    by_hand = [-0.35 + 0.5 * -0.925, -0.25 + 0.5 * -1.35, -1.0 + 0.5 * -0.7, -0.7]
    assert_close(found.advantages, torch.tensor([[*by_hand, 0.0]]))
    assert_close(found.returns[0, :4], torch.tensor(by_hand) + values[0, :4])


def test_parts_of_a_score_on_its_last_token_are_the_score():
    scores, kl, mask = torch.tensor([2.0, -1.0]), torch.rand(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    parts = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -1.0]])
    plain = shaped_rewards(scores, kl, mask, 0.1)
    assert torch.equal(shaped_rewards(scores, kl, mask, 0.1, parts), plain)
    assert torch.equal(shaped_rewards(scores, kl, mask, 0.1, torch.zeros(2, 3)), plain)
    assert not shaped_rewards(scores, kl, torch.zeros(2, 3), 0.1, parts).any()


@pytest.mark.parametrize("whitened", [False, True])
def test_a_rollout_has_the_rewards_of_its_tokens(tmp_path, whitened):
    trainer = make(tmp_path, [reward_each_token, count_letters], reward_weights=[2.0, 0.5], whiten_rewards=whitened)
    batch = rollout(trainer, [0, 1, 2, 3])
    mask = batch["completion_mask"].bool()
    assert not mask.all() and mask.any(1).all()
    kl = batch["old_per_token_logps"] - batch["ref_per_token_logps"]
    expected, every = [], []
    for row in range(4):
        ids = batch["completion_ids"][row][mask[row]].tolist()
        text = trainer.processing_class.decode(ids, skip_special_tokens=True)
        rewards = [-0.3 * kl[row, t].item() + 2.0 * (ids[t] % 5 - 2) for t in range(len(ids))]
        rewards[-1] += 0.5 * len(text) - (
            0 if set(ids) & {*ENDS, trainer.processing_class.tokenizer.eos_token_id} else 2.5
        )
        expected.append(rewards)
        every += rewards
    scale = torch.tensor(every, dtype=torch.float64).std(unbiased=False).item() + 1e-8
    mean = sum(every) / len(every)
    for row, rewards in enumerate(expected):
        if whitened:
            rewards = [(reward - mean) / scale + mean for reward in rewards]
        values = batch["old_values"][row][mask[row]].tolist()
        advantages = gae_by_definition(rewards, values, 0.9, 0.8)
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        assert_close(batch["returns"][row][mask[row]].tolist(), returns, rtol=1e-4, atol=1e-4)
    total = sum(sum(r) + 0.3 * k for r, k in zip(expected, (kl * mask).sum(1).tolist(), strict=True)) / 4
    assert trainer._metrics["train"]["ppo/score"][-1] == pytest.approx(total, rel=1e-4)


def test_a_list_with_all_on_the_last_token_trains_as_its_sum_does(tmp_path):
    losses = []
    for reward in (totals, at_the_end, reward_each_token):
        torch.manual_seed(0)
        trainer = make(tmp_path, reward, max_steps=3, seed=1)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        losses.append([(log["loss"], log["reward"], log["ppo/value_loss"]) for log in logs])
    assert losses[0] == losses[1]
    assert losses[0][0][1] == pytest.approx(losses[2][0][1])  # the same replies, and TRL logs the sum
    assert losses[0][0][2] != losses[2][0][2]


def test_none_and_numbers_may_stand_beside_lists(tmp_path):
    def some(completions, completion_ids, **columns):
        return [[1.0] * len(completion_ids[0]), None, 3.0, (0.5,) * len(completion_ids[3])]

    trainer = make(tmp_path, [some, totals], kl_coef=0.0, missing_eos_penalty=None, gamma=1.0, lam=1.0)
    batch = rollout(trainer, [0, 1, 2, 3])
    lengths = batch["completion_mask"].sum(1).tolist()
    whole = [sum(token % 5 - 2 for token in batch["completion_ids"][row, : lengths[row]].tolist()) for row in range(4)]
    first = [lengths[0] + whole[0], whole[1], 3.0 + whole[2], 0.5 * lengths[3] + whole[3]]
    assert batch["returns"][:, 0].tolist() == pytest.approx(first)
    assert batch["returns"][0, lengths[0] - 1].item() == pytest.approx(1.0 + whole[0])
    assert batch["returns"][2, lengths[2] - 1].item() == pytest.approx(3.0 + whole[2])


@pytest.mark.parametrize(
    ("reward", "kind", "fault"),
    [
        (lambda **c: [[1.0, 2.0]] * 3, ValueError, "`<lambda>` returned 3 values for 4 replies"),
        (lambda completion_ids, **c: [[0.0] * (len(ids) + 1) for ids in completion_ids], ValueError,
         r"`<lambda>` returned \d values for the \d tokens of train row 0. Return one for each of `completion_ids`"),
        (lambda completion_ids, **c: [[float("nan")] * len(ids) for ids in completion_ids], ValueError,
         r"`<lambda>` returned nan for a token of train row 0 \(reply"),
        (lambda completion_ids, **c: [["a"] * len(ids) for ids in completion_ids], TypeError,
         "`<lambda>` returned 'a' for a token of train row 0"),
        (lambda **c: 1.0, TypeError, "returned 1.0"),
    ],
    ids=["too few", "too long", "nan", "text", "number"],
)  # fmt: skip
def test_rewards_of_another_form_are_errors_that_name_the_row(tmp_path, reward, kind, fault):
    trainer = make(tmp_path, reward)
    with pytest.raises(kind, match=fault):
        rollout(trainer, [0, 1, 2, 3])


def test_asynchronous_reward_functions_may_return_lists(tmp_path):
    async def later(completions, completion_ids, **columns):
        return reward_each_token(completion_ids)

    torch.manual_seed(0)
    first = rollout(make(tmp_path, later, seed=3), [0, 1, 2, 3])
    torch.manual_seed(0)
    second = rollout(make(tmp_path, reward_each_token, seed=3), [0, 1, 2, 3])
    assert torch.equal(first["completion_ids"], second["completion_ids"])
    assert_close(first["returns"], second["returns"])


def test_groups_adapters_and_mini_batches_keep_the_rewards_with_their_tokens(tmp_path):
    options = {"num_generations": 2, "num_mini_batches": 2, "num_ppo_epochs": 2, "per_device_train_batch_size": 2}
    processor = families.load_processor("llava")
    trainer = PPOTrainer(
        str(families.saved("llava", sharp=6.0)),
        reward_funcs=reward_each_token,
        args=settings(tmp_path, **options, kl_coef=0.0, gamma=1.0, lam=1.0, max_steps=4, whiten_advantages=False),
        train_dataset=rows([1, 2, 1, 1]),
        processing_class=processor,
        peft_config=lora(),
    )
    seen = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs) or compute(model, inputs)
    trainer.train()
    assert len(seen) == 4
    for batch in seen:
        mask = batch["completion_mask"].bool()
        parts = torch.where(mask, batch["completion_ids"] % 5 - 2, 0).float()
        assert_close(batch["returns"], torch.where(mask, parts.flip(1).cumsum(1).flip(1), 0.0), rtol=1e-4, atol=1e-4)


@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one(tmp_path):
    given = {"model": str(families.saved("llava", sharp=6.0)), "images": [0, 0, 2, 1], "each_token": True}
    _, expected = main(tmp_path / "single", {}, batch=4, **given)
    report = launch("tests/trainers/ppo/distributed_main.py", "ddp", processes=2, folder=tmp_path, batch=2, **given)
    for name in REPORTED:
        assert_close(report[name], expected[name], rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("at_claim_ends", [True, False])
def test_claims_of_sampled_replies_are_rewarded_where_they_end(tmp_path, at_claim_ends):
    """The model and the checker of the benchmark: a claim is the color of one quarter of a picture."""
    processor = ppo_claims.build_processor()
    reward = ClaimReward(
        ppo_claims.KnowsTheColors(),
        ppo_claims.split_into_words,
        right=1.0,
        wrong=-0.5,
        at_claim_ends=processor.tokenizer if at_claim_ends else None,
    )
    trainer = PPOTrainer(
        ppo_claims.build_model(processor, 0),
        reward,
        settings(tmp_path, per_device_train_batch_size=16, max_completion_length=5, kl_coef=0.0, gamma=1.0, lam=1.0),
        train_dataset=ppo_claims.build_rows(16, 4, seed=0),
        processing_class=processor,
    )
    batch = rollout(trainer, list(range(16)))
    special = set(processor.tokenizer.all_special_ids)
    values = set()
    for row in range(16):
        ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        colors, said = trainer.train_dataset[row]["colors"], 0
        rewards = []
        for token in ids:
            worth = 0.0
            if token not in special:
                word = processor.tokenizer.decode([token])
                worth, said = (1.0 if colors[said : said + 1] == [word] else -0.5), said + 1
            rewards.append(worth)
        values |= set(rewards)
        to_come = [sum(rewards[t:]) if at_claim_ends else sum(rewards) for t in range(len(ids))]
        assert batch["returns"][row][: len(ids)].tolist() == pytest.approx(to_come, abs=1e-5)
    assert values == {1.0, -0.5, 0.0}
