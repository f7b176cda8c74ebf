"""As the shipped configurations run it: bf16 under ZeRO-2, ZeRO-3 and FSDP2, beside one bf16 process; and float32."""

import pytest
from torch.testing import assert_close

from tests.distributed import launch
from tests.families import saved

SCRIPT = "tests/trainers/distributed_main.py"
# One process computes under autocast from float32 weights, DeepSpeed and FSDP2 from bf16 copies of them: losses of
# around 0.7 differ in the third digit.
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def model():
    return str(saved("llava", sharp=4.0))


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return launch(SCRIPT, "single", processes=1, folder=folder, mixed_precision="bf16", model=model, batch=4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("zero2", "zero3")), "fsdp2"]
)
def test_two_processes_in_bf16_give_the_losses_of_one_and_scores_in_float32(kind, single, model, tmp_path):
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, mixed_precision="bf16", model=model, batch=2)
    for name in ("dpo full", "dpo lora", "reward full", "reward lora", "ppo full", "ppo lora"):
        found, wanted = report[name], single[name]
        assert_close(
            found["loss"], wanted["loss"], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
        read = {"dpo": ["log_probs"], "reward": ["logits"], "ppo": ["log_probs", "token_values"]}[name.split()[0]]
        assert {output: found["dtypes"][output] for output in read} == dict.fromkeys(read, ["float32"]), name


@pytest.mark.nightly
@pytest.mark.distributed
def test_in_float32_two_processes_under_fsdp2_train_all_weights_as_one_does(model, tmp_path):
    """The norm of the gradient shows what a loss shows a step later."""
    arguments = {"model": model, "methods": ["dpo", "reward", "ppo", "sft"], "adapters": [False]}
    wanted = launch(SCRIPT, "single", processes=1, folder=tmp_path / "one", batch=4, **arguments)
    report = launch(SCRIPT, "fsdp2", processes=2, folder=tmp_path / "two", batch=2, **arguments)
    for method in arguments["methods"]:
        for name in ("loss", "grad_norm"):
            found, values = report[f"{method} full"][name], wanted[f"{method} full"][name]
            assert_close(found, values, rtol=1e-4, atol=1e-5, msg=lambda text, method=method: f"{method}: {text}")
