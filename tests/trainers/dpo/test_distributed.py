"""Dense weights, shared prefixes and LoRA give the losses of one process under DDP, ZeRO-2, ZeRO-3 and FSDP2."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.distributed import launch
from tests.families import saved
from tests.trainers.dpo.distributed_main import main
from trl_vlm.trainers.dpo.reference_cache import MANIFEST, ReferenceCache

SCRIPT = "tests/trainers/dpo/distributed_main.py"


@cache
def folder_of_model() -> str:
    return str(saved("llava", sharp=4.0))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    @cache
    def run(**options):
        folder = tmp_path_factory.mktemp("single")
        trainer, report = main(folder, {"use_cpu": True, "bf16": False}, model=folder_of_model(), batch=4, **options)
        assert trainer.accelerator.num_processes == 1
        return report

    return run


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "options"),
    [("ddp", {"adapter": True, "cache": True}), ("zero2", {}), ("zero3", {"adapter": True}), ("fsdp2", {})],
)
def test_two_processes_give_the_losses_and_metrics_of_one(kind, options, single, tmp_path):
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, model=folder_of_model(), batch=2, **options)
    wanted = single(**options)
    for name, values in wanted.items():  # sums are taken in another order; nothing else differs
        assert_close(report[name], values, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert wanted["loss"][-1] < wanted["loss"][0]


def cached(folder: Path) -> tuple[dict, dict]:
    """What a reference cache says that it was made with, and its log-probabilities."""
    identity = json.loads((folder / MANIFEST).read_text())["identity"]
    cache = ReferenceCache(folder, identity)
    cache.read()
    return identity, cache.log_probs


@pytest.mark.distributed
@pytest.mark.nightly
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_under_fsdp2_two_processes_fill_the_reference_cache_of_one(adapter, tmp_path):
    arguments = {"model": folder_of_model(), "adapter": adapter, "cache": True}
    report = launch(SCRIPT, "fsdp2", processes=2, folder=tmp_path / "two", batch=2, **arguments)
    main(tmp_path / "one", {"use_cpu": True, "bf16": False}, batch=4, **arguments)
    (found_identity, found), (identity, wanted) = cached(tmp_path / "two/cache"), cached(tmp_path / "one/cache")
    assert found_identity == identity
    assert len(wanted) == 16 and found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    assert math.isclose(report["loss"][0], math.log(2), abs_tol=1e-5)  # at the start the policy is the reference


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ddp", {"adapter": True, "cache": True}),
        pytest.param("zero2", {}, marks=pytest.mark.nightly),
        ("zero3", {}),
        # TRL takes reentrant checkpointing here, which is refused.
        pytest.param("zero3", {"adapter": True, "checkpointing": False}, marks=pytest.mark.nightly),
        pytest.param("fsdp2", {}, marks=pytest.mark.nightly),
    ],
)
def test_the_image_pair_of_two_processes_is_that_of_one(kind, options, single, tmp_path):
    """Policy and reference run twice before the gradient is taken; segments and replies have weights."""
    arguments = {"model": folder_of_model(), "image": True, **options}
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, batch=2, **arguments)
    wanted = single(image=True, **options)
    assert math.isclose(wanted["image/loss"][0], math.log(2), abs_tol=1e-5)
    for name, values in wanted.items():
        assert_close(report[name], values, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert wanted["image/loss"][-1] < wanted["image/loss"][0]


@pytest.mark.nightly
@pytest.mark.distributed
def test_under_fsdp2_in_bfloat16_log_probabilities_are_not_rounded(tmp_path):
    arguments = {"model": folder_of_model(), "batch": 2}
    report = launch(SCRIPT, "fsdp2", processes=2, folder=tmp_path / "two", mixed_precision="bf16", **arguments)
    _, wanted = main(tmp_path / "one", {"use_cpu": True, "bf16": True}, model=folder_of_model(), batch=4)
    assert math.isclose(report["loss"][0], math.log(2), abs_tol=1e-5)
    # FSDP2 also rounds parameters, as autocast does; with rounded log-probabilities the difference was 0.048.
    assert_close(report["loss"], wanted["loss"], rtol=0, atol=0.03)
    assert wanted["loss"][-1] < wanted["loss"][0]


@pytest.mark.nightly
@pytest.mark.distributed
def test_two_processes_encode_an_image_once_and_give_the_same_losses_to_the_last_digit(tmp_path):
    report = {}
    for limit in (0.0, 1.0):
        options = {"targets": "language-model", "options": {"image_feature_cache": limit}}
        folder = tmp_path / str(limit)
        report[limit] = launch(
            *(SCRIPT, "ddp"), processes=2, folder=folder, model=folder_of_model(), batch=2, adapter=True, **options
        )
    assert 2 * report[1.0]["encoded"] == report[0.0]["encoded"] > 0  # once, not for policy and reference
    assert report[1.0]["loss"] == report[0.0]["loss"]
