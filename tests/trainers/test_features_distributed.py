"""Two processes encode an image once where nothing of the tower trains, also where each holds a part of the tower."""

import pytest

from tests.distributed import launch
from tests.families import saved
from tests.lora_models import reward_adapter

pytestmark = [pytest.mark.distributed, pytest.mark.nightly]

SCRIPT = "tests/trainers/features_distributed_main.py"
IMAGES = [1, 2, 1, 1]
METHODS = ("DPO", "PPO")
KINDS = ("ddp", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    model = str(saved("llava", sharp=3.0))
    reward = reward_adapter(model, tmp_path_factory.mktemp("reward"), target_modules=r".*language_model.*_proj")
    return {"model": model, "reward_model": reward, "images": IMAGES}


def expected_images(method):
    """DPO sees each row in each of two steps; PPO in each of two rollouts."""
    return 2 * sum(IMAGES)


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_encoded_once_for_all_roles_passes_and_replies(kind, models, tmp_path):
    runs = [[method, name] for method in METHODS for name in ("kept", "each time")]
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, runs=runs, **models)
    for method in METHODS:
        kept, each_time = report[f"{method} kept"], report[f"{method} each time"]
        assert sum(kept["images"]) == expected_images(method)
        assert sum(each_time["images"]) >= 2 * expected_images(method)
        for name, values in each_time["logs"].items():
            assert kept["logs"][name] == pytest.approx(values, rel=1e-5, abs=1e-6), (method, name)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_too(kind, models, tmp_path):
    runs = [[method, "kept"] for method in METHODS]
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, mixed_precision="bf16", runs=runs, **models)
    for method in METHODS:
        assert sum(report[f"{method} kept"]["images"]) == expected_images(method)


@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_what_one_process_misses_all_encode_together(kind, models, tmp_path):
    runs = [["PPO", name] for name in ("each time", "missed by one")]
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, runs=runs, **models)
    one, other = report["PPO each time"], report["PPO missed by one"]
    # The first process has its features, and runs the tower on one image for each pass of the other.
    assert len(set(other["images"])) == 2 and sum(other["images"]) < sum(one["images"])
    assert max(other["images"]) > max(IMAGES) * 4
    for name, values in one["logs"].items():
        assert other["logs"][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
