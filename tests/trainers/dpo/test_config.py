"""Options that contradict each other are refused when they are set, with what to do."""

import dataclasses
import math

import pytest
import trl

from trl_vlm import DPOConfig
from trl_vlm.trainers.dpo.config import PRESETS

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


def config(**options):
    return DPOConfig("out", **QUIET | options)


def test_nothing_set_is_trls_configuration():
    ours, theirs = config(), trl.DPOConfig("out", **QUIET)
    for field in dataclasses.fields(trl.DPOConfig):
        if field.name not in ("logging_dir",):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_presets_set_all_three_values():
    paper, release = config(dense_preset="paper"), config(dense_preset="release")
    assert (paper.dense_gamma, paper.beta, paper.dense_reduction) == (5.0, 0.5, "mean")
    assert (release.dense_gamma, release.beta, release.dense_reduction) == (1.1, 0.1, "sum")


def test_presets_of_the_image_side_set_the_published_values():
    mdpo, chip, opa = (config(image_preset=name) for name in ("mdpo", "chip", "opa"))
    assert (mdpo.image_weight, mdpo.anchor_weight, mdpo.anchor_value, mdpo.beta) == (1.0, 1.0, 0.0, 0.1)
    assert (mdpo.image_corruption, mdpo.image_crop_min_area, mdpo.image_crop_max_area) == ("crop", 0.01, 0.2)
    assert (chip.image_weight, chip.anchor_weight, chip.image_inside, chip.beta) == (1.0, 0.0, True, 0.1)
    assert (chip.image_corruption, chip.noise_steps, chip.dense_gamma, chip.dense_reduction) == (
        "noise",
        500,
        4,
        "sum",
    )
    assert (opa.image_weight, opa.anchor_weight, opa.beta, opa.image_inside) == (0.2, 1.0, 0.1, False)
    assert (opa.image_corruption, opa.image_mask_ratio) == ("mask", 0.3)
    other = config(image_preset="mdpo", image_corruption="mask")
    assert (other.image_corruption, other.image_mask_ratio, other.image_weight) == ("mask", 1.0, 1.0)


def test_saved_arguments_load_again():
    for preset in ("mdpo", "chip", "opa"):
        first = config(image_preset=preset)
        fields = [field.name for field in dataclasses.fields(first) if field.name.startswith(("image_", "anchor_"))]
        again = config(**{name: getattr(first, name) for name in fields})
        assert again.to_dict() == first.to_dict()
    for preset in PRESETS:
        first = config(dense_preset=preset)
        names = ("dense_preset", "dense_gamma", "dense_reduction", "beta")
        again = config(**{name: getattr(first, name) for name in names})
        assert again.beta == first.beta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dense_preset": "paper", "beta": 0.1},
            "`beta` is 0.1, but the preset 'paper' sets it to 0.5. The presets do not mix",
        ),
        ({"dense_preset": "release", "dense_gamma": 5.0}, "`dense_gamma` is 5.0, but the preset 'release'"),
        ({"dense_preset": "paper", "dense_reduction": "sum"}, "`dense_reduction` is 'sum', but the preset 'paper'"),
        ({"dense_preset": "best"}, "must be one of paper, release"),
        ({"dense_gamma": 5.0}, "needs `dense_gamma` .* and `dense_reduction` .* together"),
        ({"dense_gamma": 0.5, "dense_reduction": "sum"}, "corrected tokens would count less"),
        ({"dense_gamma": math.nan, "dense_reduction": "sum"}, "`dense_gamma` is nan; it must be a number from 1.0 on"),
        ({"dense_gamma": 2.0, "dense_reduction": "median"}, "must be 'mean' or 'sum'"),
        ({"dense_preset": "release", "loss_type": ["ipo"]}, "ipo divides by the number of reply tokens"),
        ({"dense_preset": "release", "loss_type": ["sigmoid_norm"]}, "Use `dense_reduction='mean'`"),
        ({"dense_preset": "paper", "loss_type": ["ipo", "sigmoid"]}, "cannot be combined with sigmoid"),
        (
            {"dense_preset": "paper", "ld_alpha": 0.5},
            "`ld_alpha` cannot be combined with Dense DPO: it weighs tokens too",
        ),
        ({"dense_preset": "paper", "f_divergence_type": "forward_kl"}, "which a weighted score is not"),
        ({"dense_preset": "paper", "precompute_ref_log_probs": True}, "`reference_cache` stores what Dense DPO needs"),
        ({"dense_min_match": 0}, "must be at least 1"),
        ({"rejected_weight": 1.5}, "must lie between 0 and 1"),
        ({"reference_cache": "x", "sync_ref_model": True}, "one fixed reference"),
        ({"degeneration_steps": 0}, "set 1 or more"),
        ({"bad_pairs": "ignore"}, "must be 'error' or 'skip'"),
        ({"image_preset": "vdpo"}, "`image_preset` is 'vdpo'; it must be one of mdpo, chip, opa"),
        ({"image_preset": "mdpo", "beta": 0.5}, "`beta` is 0.5, but the preset 'mdpo' sets it to 0.1"),
        ({"image_preset": "opa", "image_weight": 1.0}, "`image_weight` is 1.0, but the preset 'opa' sets it to 0.2"),
        ({"image_preset": "chip", "dense_preset": "paper"}, "`dense_gamma` is 4.0, but the preset 'paper'"),
        ({"image_weight": -1.0, "image_corruption": "mask"}, "must not be negative: the term would reward"),
        ({"anchor_value": math.inf}, "`anchor_value` is inf; it must be a finite number"),
        ({"image_weight": 1.0, "image_corruption": "blur"}, "must be one of mask, noise, crop, other"),
        ({"image_mask_ratio": 0.0}, "`image_mask_ratio` is 0.0; it is a share"),
        ({"image_crop_min_area": 0.5}, "both must be above 0 and at most 1, the smaller one first"),
        ({"image_corruption": "noise", "noise_steps": 1000}, "the schedule \\(code\\) has 0 to 999"),
        ({"image_inside": True}, "`image_inside` adds the image pair to the loss, and `image_weight` is 0"),
        ({"image_preset": "chip", "loss_type": ["apo_zero"]}, "so it needs .* losses of that difference alone"),
        ({"image_preset": "mdpo", "loss_type": ["sft"]}, "`image_weight` weighs a preference loss"),
        ({"image_preset": "mdpo", "precompute_ref_log_probs": True}, "Use `reference_cache`"),
        ({"anchor_weight": 1.0, "reference_free": True}, "the anchor reads the reference"),
        ({"image_preset": "mdpo", "reference_cache": "x"}, "Set `image_seed`, which fixes it"),
        (
            {"image_weight": 1.0, "image_corruption": "other", "reference_cache": "x", "image_seed": 0},
            "depends on the other rows. Write it into a column `rejected_images`",
        ),
    ],
)
def test_a_contradiction_is_refused_with_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    "loss", [["sigmoid"], ["sigmoid", "sft"], ["ipo"], ["ipo", "sft"], ["sigmoid_norm"], ["apo_zero"]]
)
def test_the_mean_goes_with_every_loss_that_reads_one_kind_of_score(loss):
    assert config(dense_preset="paper", loss_type=loss).loss_type == loss


def test_every_option_has_a_help_line():
    ours = {field.name for field in dataclasses.fields(DPOConfig)} - {
        f.name for f in dataclasses.fields(trl.DPOConfig)
    }
    assert len(ours) > 10
    for field in dataclasses.fields(DPOConfig):
        assert field.name not in ours or field.metadata["help"]
