"""The checks of a generative model: good models of every family pass, and each check finds a model that is broken."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.families import FAMILIES, build
from tests.models.prefix_sharing.distributed_main import rejected
from trl_vlm.doctor import policy
from trl_vlm.doctor.model import describe
from trl_vlm.doctor.subject import Subject
from trl_vlm.models import families
from trl_vlm.models.prefix_sharing import sharing

CHECKS = ("pixels matter", "padding on the right", "padding on the left", "masked image tokens", "shared prompts")


def subject(family="llava", **options):
    return Subject(*build(family, sharp=6.0, **options))


def verdicts(findings):
    return {finding.name: finding.verdict for finding in findings}


def lines(findings):
    return {finding.name: finding for finding in findings}


@pytest.mark.parametrize("family", [*FAMILIES, "gemma4", "llava_onevision", "qwen3_vl_moe"])
def test_a_good_model_passes_every_check(family):
    findings = policy.examine(subject(family))
    assert verdicts(findings) == dict.fromkeys(CHECKS, "ok"), "\n".join(map(str, findings))
    assert all(finding.number is not None for finding in findings)


def test_a_family_that_no_test_knows_is_certified_by_what_is_computed(monkeypatch):
    unknown = subject("llava")
    monkeypatch.delitem(families.FAMILIES, "llava")
    assert verdicts(policy.examine(unknown)) == dict.fromkeys(CHECKS, "ok")
    monkeypatch.setattr("trl_vlm.doctor.model.SHARING_FAMILIES", ())
    about = lines(describe(unknown))
    assert "unknown to the tests" in about["family"].text
    assert about["shared prompts"].text.startswith("on if the first batch")


def test_a_model_that_does_not_use_its_tower_is_reported():
    blind = subject()
    last = blind.model.model.multi_modal_projector.linear_2
    torch.nn.init.zeros_(last.weight)
    found = verdicts(policy.examine(blind))
    assert found == dict.fromkeys(CHECKS, "ok") | {"pixels matter": "differs"}


def test_a_model_that_ignores_its_attention_mask_is_reported():
    broken = subject()

    def ignore(backbone, args, kwargs):
        return args, kwargs | {"attention_mask": torch.ones_like(kwargs["input_ids"])}

    broken.model.model.register_forward_pre_hook(ignore, with_kwargs=True)
    found = verdicts(policy.examine(broken))
    assert found["padding on the left"] == found["masked image tokens"] == "differs"
    assert found["pixels matter"] == "ok"


def test_a_model_whose_tokens_see_all_others_is_reported():
    broken = subject()

    def mix(module, args, output):
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    broken.model.model.language_model.register_forward_hook(mix)
    found = verdicts(policy.examine(broken))
    assert found["padding on the right"] == found["padding on the left"] == found["shared prompts"] == "differs"


def test_replies_at_wrong_positions_are_reported(monkeypatch):
    right = sharing._positions
    monkeypatch.setattr(
        sharing, "_positions", lambda backbone, slots, packed: right(backbone, slots, packed) + rejected(slots)
    )
    found = verdicts(policy.examine(subject("qwen2_5_vl")))
    assert found == dict.fromkeys(CHECKS, "ok") | {"shared prompts": "differs"}


def test_what_a_model_cannot_do_is_a_sentence():
    findings = lines(policy.examine(subject("qwen3_5")))
    assert findings["shared prompts"].verdict == "not possible"
    assert "layers of type linear_attention" in findings["shared prompts"].text


def test_an_adapter_is_looked_at_with_its_base_and_nothing_of_the_model_stays_changed():
    model, processor = build("qwen2_5_vl", sharp=6.0)
    lora = LoraConfig(r=2, target_modules="all-linear", exclude_modules=".*visual.*")
    looked_at = Subject(get_peft_model(model, lora).eval(), processor)
    before = {name: parameter.requires_grad for name, parameter in looked_at.model.named_parameters()}
    assert verdicts(policy.examine(looked_at)) == dict.fromkeys(CHECKS, "ok")
    assert {name: parameter.requires_grad for name, parameter in looked_at.model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in looked_at.model.parameters())
    assert lines(describe(looked_at))["adapter"].text.startswith("LORA, rank 2 on")


def test_bfloat16_passes_within_its_own_tolerance():
    model, processor = build("llava", sharp=4.0)
    half = Subject(model.bfloat16(), processor)
    findings = policy.examine(half)
    assert verdicts(findings) == dict.fromkeys(CHECKS, "ok"), "\n".join(map(str, findings))
    assert "in bfloat16" in lines(findings)["shared prompts"].text


def test_the_gradients_that_are_compared_are_of_every_part():
    watched = subject().watched_parameters()
    assert 12 <= len(watched) <= 24  # of tower, projector and language model; the head is a table
