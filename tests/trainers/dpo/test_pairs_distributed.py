"""Online BDHS and online DPO: on two processes the pairs of one process, and so its losses."""

from functools import cache

import pytest
from torch.testing import assert_close

from tests.distributed import launch
from tests.families import saved
from tests.trainers.dpo.pairs_distributed_main import main

pytestmark = pytest.mark.slow

SCRIPT = "tests/trainers/dpo/pairs_distributed_main.py"
TRAINED = "draws of the first step, by the trained policy"


@cache
def folder_of_model() -> str:
    return str(saved("llava", sharp=4.0))


def single(folder, **options):
    _, report = main(folder, {"use_cpu": True, "bf16": False}, model=folder_of_model(), batch=4, **options)
    return report


@pytest.mark.parametrize("source", ["bdhs", "judged"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_twenty_steps_on_one_process_and_replies_follow_the_policy(source, adapter, tmp_path):
    report = single(tmp_path, source=source, adapter=adapter, steps=20)
    assert len(report["loss"]) == 20
    before, after = report["pairs"][0], report[TRAINED]
    assert [name for name, _ in before] == [name for name, _ in after]
    assert before != after  # the random draws are the same, so this is the policy's doing
    if source == "bdhs":  # a judge that likes long replies cannot be learnt from samples of six tokens
        assert report["loss"][-1] < report["loss"][0] - 0.1


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("zero2", {"source": "judged", "undecided": True}),
        pytest.param("zero3", {"source": "bdhs", "adapter": True, "callback": True}, marks=pytest.mark.nightly),
        pytest.param("fsdp2", {"source": "bdhs", "adapter": True}, marks=pytest.mark.nightly),
    ],
)
def test_two_processes_make_the_pairs_of_one_and_train_like_it(kind, options, tmp_path):
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path / kind, model=folder_of_model(), batch=2, **options)
    wanted = single(tmp_path / "single", **options)
    assert report["pairs"] == wanted["pairs"] and report[TRAINED] == wanted[TRAINED]
    for name in ("loss", "rewards/margins"):  # sums are taken in another order; nothing else differs
        assert_close(report[name], wanted[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    if "undecided" in options:
        # Processes keep as many pairs as the one with the fewest, and a step without any does no harm.
        assert max(report["pairs/left_out"]) > 0 and max(report["pairs/none"]) == 1
        assert max(wanted["pairs/left_out"]) == 0
    if "callback" in options:
        # Plain TRL: each process makes half of the pairs of each of two epochs, and both train on all of them.
        (replies,) = wanted["callback's replies of each process"]
        assert report["callback's replies of each process"] == [replies, replies]
        assert report["callback's calls of each process"] == [4, 4] and wanted["callback's calls of each process"] == [
            4
        ]
        assert_close(report["callback's losses"], wanted["callback's losses"], rtol=1e-3, atol=1e-4)
