"""The checks of a reward model: good ones pass, and each check finds a model that is broken."""

import pytest
import torch

from tests.families import load_processor, saved
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.doctor import scoring
from trl_vlm.doctor.subject import Subject
from trl_vlm.models.reward_model import load_reward_model

TEMPLATE = JudgeTemplate("judge . {facts}", "facts : {bullets} .", bullet="{fact}", separator=" ; ", opening="it is")
FOLLOWS = ("scores follow images", "scores follow facts", "scores tell replies apart")
CHECKS = (*FOLLOWS, "padding on the right", "padding on the left", "shared prompts")


def subject(family="llava", template=TEMPLATE):
    model = load_reward_model(saved(family, sharp=6.0), head_seed=1).eval()
    return Subject(model, load_processor(family), template)


def verdicts(findings):
    return {finding.name: finding.verdict for finding in findings}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
def test_a_good_reward_model_passes_every_check(family):
    findings = scoring.examine(subject(family))
    assert verdicts(findings) == dict.fromkeys(CHECKS, "ok"), "\n".join(map(str, findings))


def test_a_family_whose_pairs_share_nothing_says_so():
    findings = {finding.name: finding for finding in scoring.examine(subject("paligemma"))}
    assert findings["shared prompts"].verdict == "not possible"
    assert "attention in both directions" in findings["shared prompts"].text


def test_a_reward_model_that_is_blind_is_reported():
    blind = subject()
    torch.nn.init.zeros_(blind.model.model.multi_modal_projector.linear_2.weight)
    assert verdicts(scoring.examine(blind)) == dict.fromkeys(CHECKS, "ok") | {"scores follow images": "differs"}


def test_a_chat_template_that_loses_the_judge_turn_is_reported():
    deaf = subject(template=JudgeTemplate("judge . {facts}", "facts : {bullets} .", bullet="{fact}", opening=""))
    template = deaf.processor.chat_template
    deaf.processor.chat_template = template.replace("for message in messages %}", "for message in messages[:2] %}")
    assert deaf.processor.chat_template != template
    assert verdicts(scoring.examine(deaf)) == dict.fromkeys(CHECKS, "ok") | {"scores follow facts": "differs"}


def test_a_head_of_zeros_follows_nothing():
    silent = subject()
    torch.nn.init.zeros_(silent.model.score.weight)
    found = verdicts(scoring.examine(silent))
    assert [found[name] for name in FOLLOWS] == ["differs"] * 3


def test_a_reward_model_that_ignores_its_mask_is_reported():
    broken = subject()

    def ignore(backbone, args, kwargs):
        return args, kwargs | {"attention_mask": torch.ones_like(kwargs["input_ids"])}

    broken.model.model.register_forward_pre_hook(ignore, with_kwargs=True)
    assert verdicts(scoring.examine(broken))["padding on the left"] == "differs"


def test_a_template_without_facts_leaves_that_check_out():
    findings = {finding.name: finding for finding in scoring.examine(subject(template=JudgeTemplate.none()))}
    assert findings["scores follow facts"].verdict == "not possible"
    assert findings["scores follow facts"].text == "the judge template shows no facts"
