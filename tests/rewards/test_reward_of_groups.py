"""Replies to one prompt are scored together, and each gets the score that it gets alone."""

import functools

import pytest
from PIL import Image

from tests import families
from tests.lora_models import reward_adapter
from tests.trainers.group_helpers import count_tower_passes
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.families import FAMILIES as KNOWN
from trl_vlm.models.families import SHARING_FAMILIES
from trl_vlm.models.reward_model import load_reward_model
from trl_vlm.rewards import RewardModelReward

TEMPLATE = JudgeTemplate("judge . {facts}", "facts : {bullets} .", bullet="{fact}", separator=" ; ", opening="it is")
REPLIES = ["A cat.", "A red square on a white wall, and a dog.", "A cat.", "No."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        load_reward_model(families.saved(family, sharp=6.0), head_seed=1).save_pretrained(folder)
        families.load_processor(family).save_pretrained(folder)
        TEMPLATE.save_pretrained(folder)
        return folder

    return make


def groups(images=(1, 2, 0)):
    """Three prompts with four replies each, as a rollout has them: every reply with its own copy of the images."""
    columns = {"prompts": [], "completions": [], "images": [], "facts": []}
    for number, count in enumerate(images):
        for reply in REPLIES:
            columns["prompts"].append([{"role": "user", "content": "What is it?" + " Describe it." * number}])
            columns["completions"].append([{"role": "assistant", "content": reply}])
            columns["images"].append([families.image(10 * number + place) for place in range(count)])
            columns["facts"].append(["a cat", "a dog"][:number])
    return columns


def scores(reward, **columns):
    return reward(**(columns or groups()))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_scores_are_those_of_replies_that_are_read_one_by_one(family, folder):
    place = folder(family)
    columns = groups((1, 1, 1) if family == "paligemma" else (1, 2, 0))
    alone = RewardModelReward(place, share_prefix=False, batch_size=1)
    wanted = scores(alone, **columns)
    reward = RewardModelReward(place, batch_size=8)  # cuts the last group off
    tower = count_tower_passes(reward.model)
    assert scores(reward, **columns) == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted)) > 6
    alone_tower = count_tower_passes(alone.model)
    scores(alone, **columns)
    shares = family in SHARING_FAMILIES and family != "paligemma"  # which reads a whole conversation as one prompt
    assert (sum(tower) < sum(alone_tower) / 2) is shares


def test_replies_about_other_images_or_prompts_share_nothing_with_each_other(folder):
    reward = RewardModelReward(folder("llava"), batch_size=12)
    tower = count_tower_passes(reward.model)
    columns = groups((1, 1, 1))
    scores(reward, **columns)
    columns["prompts"] = [columns["prompts"][0]] * 12  # the same words about three images
    scores(reward, **columns)
    columns["images"] = [columns["images"][0]] * 4 + [columns["images"][4]] * 8
    scores(reward, **columns)
    assert [pixels // (3 * 28 * 28) for pixels in tower] == [3, 3, 2]


def test_replies_are_not_shared_over_rows_that_stand_between_them(folder):
    """Only neighbors are compared: comparing every image with every other one would cost more than it saves."""
    reward = RewardModelReward(folder("llava"), batch_size=12)
    tower = count_tower_passes(reward.model)
    columns = groups((1, 1, 1))
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    mixed = {name: [values[row] for row in order] for name, values in columns.items()}
    found = scores(reward, **mixed)
    assert [pixels // (3 * 28 * 28) for pixels in tower] == [8]
    assert found == pytest.approx([scores(reward, **columns)[row] for row in order], abs=1e-5)


def test_images_of_other_kinds_are_compared_by_what_names_them(folder, tmp_path):
    families.image(0).save(tmp_path / "image.png")
    reward = RewardModelReward(folder("llava"), batch_size=4)
    tower = count_tower_passes(reward.model)
    columns = {name: values[:4] for name, values in groups((1, 1, 1)).items()}
    wanted = scores(reward, **columns)
    data = (tmp_path / "image.png").read_bytes()
    for image in (str(tmp_path / "image.png"), {"bytes": data, "path": None}, Image.open(tmp_path / "image.png")):
        assert scores(reward, **{**columns, "images": [[image]] * 4}) == pytest.approx(wanted, abs=1e-5)
    assert [pixels // (3 * 28 * 28) for pixels in tower] == [1] * 4


def test_adapters_and_models_of_a_family_that_no_test_knows_score_as_before(folder, tmp_path, monkeypatch):
    adapter = reward_adapter(families.saved("llava", sharp=6.0), tmp_path / "adapter")
    shared, alone = (RewardModelReward(adapter, share_prefix=share, batch_size=12) for share in (True, False))
    tower = count_tower_passes(shared.model)
    assert scores(shared) == pytest.approx(scores(alone), abs=1e-5)
    assert sum(tower) == 3 * 3 * 28 * 28
    monkeypatch.delitem(KNOWN, "llava")
    wanted = scores(RewardModelReward(folder("llava"), batch_size=12, share_prefix=False))
    tried = RewardModelReward(folder("llava"), batch_size=12)
    assert scores(tried) == pytest.approx(wanted, abs=1e-5)
    tower = count_tower_passes(tried.model)
    assert scores(tried) == pytest.approx(wanted, abs=1e-5)
    assert sum(tower) == 3 * 3 * 28 * 28
