import pytest
import torch

from tests import families
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.pairs import generating
from trl_vlm.pairs.draws import Draws, GumbelSampler
from trl_vlm.pairs.source import reference_reply, row_draws


def test_draws_hang_on_seed_turn_row_and_purpose_alone():
    draws = Draws(seed=1, round=2, row="row 3")
    streams = {draws.seed_of("a", 1), draws.seed_of("a", 2), draws.seed_of("a"), draws.seed_of("b", 1)}
    streams |= {other.seed_of("a", 1) for other in (Draws(0, 2, "row 3"), Draws(1, 0, "row 3"), Draws(1, 2, "row 4"))}
    assert len(streams) == 7
    assert draws.seed_of("a", 1) == Draws(1, 2, "row 3").seed_of("a", 1)
    assert draws.random("a").random() == draws.random("a").random()
    assert torch.equal(*(torch.rand(3, generator=draws.generator("a")) for _ in range(2)))


def test_a_row_is_known_by_its_name_and_else_by_its_place():
    assert row_draws({ROW_NAME: "train row 7"}, 0, 0, 0) == row_draws({ROW_NAME: "train row 7"}, 5, 0, 0)
    assert row_draws({}, 0, 0, 0) != row_draws({}, 1, 0, 0)


def test_samples_follow_the_softmax_of_the_logits_over_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    for temperature in (1.0, 0.5):
        sampler = GumbelSampler(range(4000), temperature)
        tokens = sampler(None, logits.expand(4000, 4)).argmax(-1)
        shares = torch.bincount(tokens, minlength=4) / 4000
        expected = (logits / temperature).softmax(-1)
        assert ((shares - expected).abs() <= 3.5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_sequence_gets_the_same_tokens_whatever_is_sampled_beside_it():
    logits = torch.randn(5, 3, 50, generator=torch.Generator().manual_seed(0))  # steps, sequences, tokens
    together, alone = GumbelSampler([7, 8, 9]), GumbelSampler([8])
    leaving = GumbelSampler([7, 8, 9])
    for step in range(5):
        all_three = together(None, logits[step])
        torch.testing.assert_close(alone(None, logits[step, 1:2]), all_three[1:2])
        stay = [0, 1, 2] if step < 2 else [1, 2]  # the first has ended
        torch.testing.assert_close(leaving(None, logits[step, stay], stay), all_three[stay])


def test_temperature_zero_is_greedy():
    logits = torch.randn(2, 9)
    assert GumbelSampler([0, 1], temperature=0)(None, logits) is logits
    with pytest.raises(ValueError, match="must be 0"):
        GumbelSampler([0], temperature=-1)
    with pytest.raises(ValueError, match="3 sequences came with 2 seeds"):
        GumbelSampler([0, 1])(None, torch.zeros(3, 4))


def test_a_model_generates_with_a_cache_and_goes_on_training_as_before():
    model, processor = families.build("llava")
    model.train()
    model.model.vision_tower.eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    modes = {name: module.training for name, module in model.named_modules()}
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    batch = families.batch(processor, [1], padding_side="left")
    with generating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    hook.remove()
    assert lengths == [batch["input_ids"].shape[1], 1, 1]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache is False and torch.is_grad_enabled() and model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": []}, "row 4: there is no reference reply"),
        ({"completion": [{"role": "assistant", "content": "  "}]}, "row 4, column 'completion': the reply is empty"),
        ({"chosen": [{"role": "user", "content": "A cat."}]}, "row 4, column 'chosen': the reply is the user's"),
        ({"chosen": [{"role": "assistant", "content": "A."}] * 2}, "is one assistant message"),
    ],
)
def test_a_row_without_a_reference_reply_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        reference_reply(row, "row 4")


def test_the_completion_is_the_reference_and_else_the_chosen_reply():
    first, second = ([{"role": "assistant", "content": text}] for text in ("A cat.", "A dog."))
    assert reference_reply({"completion": first, "chosen": second}, "") == "A cat."
    assert reference_reply({"completion": None, "chosen": second}, "") == "A dog."
