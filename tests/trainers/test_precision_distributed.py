"""As the shipped configurations run it: bf16 under ZeRO-2, ZeRO-3 and FSDP2, beside one bf16 process; and float32."""

import functools

import pytest
from torch.testing import assert_close

from tests.distributed import launch
from tests.families import saved

SCRIPT = "tests/trainers/distributed_main.py"
RUNS = ("dpo full", "dpo lora", "reward full", "reward lora", "ppo full", "ppo lora")
ADDITIONS = ("dpo additions full", "dpo additions lora")  # the image pair, weights of segments and replies
SUPERVISED = ("sft full", "sft lora")
IN_FLOAT32 = ("dpo full", "reward full", "ppo tokens full", *ADDITIONS, *SUPERVISED)
RESUMED = (ADDITIONS[0], SUPERVISED[1])
# One process computes under autocast from float32 weights, DeepSpeed and FSDP2 from bf16 copies of them: losses of
# around 0.7 differ in the third digit.
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def model():
    return str(saved("llava", sharp=4.0))


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    @functools.cache
    def run(*runs):
        folder = tmp_path_factory.mktemp("single")
        arguments = {"model": model, "batch": 4, "runs": runs}
        return launch(SCRIPT, "single", processes=1, folder=folder, mixed_precision="bf16", **arguments)

    return run


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        pytest.param("zero2", (*ADDITIONS, *SUPERVISED), marks=pytest.mark.nightly),
        pytest.param("zero3", (*ADDITIONS, *SUPERVISED), marks=pytest.mark.nightly),
        ("fsdp2", (ADDITIONS[0], SUPERVISED[1])),
    ],
)
def test_two_processes_in_bf16_give_the_losses_of_one_and_scores_in_float32(kind, more, single, model, tmp_path):
    runs, resumed = (*RUNS, *more), RESUMED if kind == "zero3" else ()
    arguments = {"model": model, "batch": 2, "runs": runs, "resumed": resumed}
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, mixed_precision="bf16", **arguments)
    alone = single(*runs)
    for name in runs:
        found, wanted = report[name], alone[name]
        assert_close(
            found["loss"], wanted["loss"], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
        read = {"reward": ["logits"], "ppo": ["log_probs", "token_values"]}.get(name.split()[0], ["log_probs"])
        assert {output: found["dtypes"][output] for output in read} == dict.fromkeys(read, ["float32"]), name
    assert_resumed(report, resumed)


@pytest.fixture(scope="module")
def single_in_float32(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float32")
    return launch(SCRIPT, "single", processes=1, folder=folder, batch=4, model=model, runs=IN_FLOAT32)


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "runs", "resumed"), [("ddp", SUPERVISED, ()), ("fsdp2", IN_FLOAT32, RESUMED)])
def test_in_float32_two_processes_train_as_one_does(kind, runs, resumed, single_in_float32, model, tmp_path):
    """The norm of the gradient shows what a loss shows a step later."""
    arguments = {"model": model, "batch": 2, "runs": runs, "resumed": resumed}
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, **arguments)
    for run in runs:
        for name in ("loss", "grad_norm"):
            found, values = report[run][name], single_in_float32[run][name]
            assert_close(found, values, rtol=1e-4, atol=1e-5, msg=lambda text, run=run: f"{run}: {text}")
    assert_resumed(report, resumed)


def assert_resumed(report, runs):
    """From a checkpoint the last step has the loss and the gradient of the run that was not interrupted."""
    for run in runs:
        for name in ("loss", "grad_norm"):
            assert report[f"{run} again"][name] == pytest.approx(report[run][name], rel=1e-6), (run, name)
