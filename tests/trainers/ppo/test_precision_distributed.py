"""PPO of four roles on one base in bf16: a backend is nearer to one process than two precisions are to each other."""

import logging
import os
from itertools import combinations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests.distributed import launch
from tests.families import saved
from tests.lora_models import reward_adapter
from tests.trainers.ppo.precision_distributed_main import CLEAR_DRAWS, main, numbers_of_roles
from trl_vlm.models.reward_model import load_reward_model

logger = logging.getLogger(__name__)

SCRIPT = "tests/trainers/ppo/precision_distributed_main.py"
DRAWS = CLEAR_DRAWS[: int(os.environ.get("PRECISION_DRAWS", "2"))]
# Precision of the run on one process: `bf16` and the base's dtype.
PRECISIONS = {"float32": (False, "float32"), "autocast": (True, "float32"), "bf16 base": (True, "bfloat16")}
# Which of them a backend computes in: ZeRO and FSDP2 make bf16 copies of all weights.
ON_ONE_PROCESS = {"ddp": "autocast", "zero2": "bf16 base", "zero3": "bf16 base", "fsdp2": "bf16 base"}
BEFORE_TRAINING = ("log_probs", "reference_log_probs", "values", "scores")
MEASURED = (*BEFORE_TRAINING, "loss", "weights", "trained_log_probs", "trained_values")

pytestmark = [pytest.mark.distributed, pytest.mark.nightly]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    model = str(saved("llava", sharp=3.0))
    reward_model = reward_adapter(model, tmp_path_factory.mktemp("reward"))
    weights = f"{reward_model}/adapter_model.safetensors"
    rounded = {name: weight.bfloat16().float() for name, weight in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})
    return {"model": model, "reward_model": reward_model}


def with_weights(report: dict, folder: Path) -> dict[str, dict]:
    """The report of each draw, with its weights."""
    return {draw: {**run, **torch.load(folder / f"{draw}.pt")} for draw, run in report["draws"].items()}


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    """The runs of each precision."""
    found = {}
    for name, (bf16, dtype) in PRECISIONS.items():
        folder, options = tmp_path_factory.mktemp("run"), {"model_init_kwargs": {"dtype": dtype}}
        _, report = main(folder, {"use_cpu": True, "bf16": bf16}, draws=DRAWS, batch=4, **models, **options)
        found[name] = with_weights(report, folder)
    return found


def flat(numbers: dict[str, Tensor] | list) -> Tensor:
    if isinstance(numbers, dict):
        return torch.cat([numbers[name].double().flatten() for name in sorted(numbers)])
    return torch.tensor(numbers).double().flatten()


def distances(found: dict[str, dict], wanted: dict[str, dict]) -> dict[str, float]:
    """Root mean squares over all draws, of what is measured in runs that gave the same replies."""
    assert found.keys() == wanted.keys()
    assert [run["tokens"] for run in found.values()] == [run["tokens"] for run in wanted.values()]
    errors = {
        name: torch.cat([flat(found[draw][name]) - flat(wanted[draw][name]) for draw in wanted]) for name in MEASURED
    }
    return {name: rms(error) for name, error in errors.items()}


def rms(error: Tensor) -> float:
    return error.pow(2).mean().sqrt().item()


@pytest.fixture(scope="module")
def of_precisions(one_process):
    """The distance of two precisions of the same run on one process: of the three pairs, the largest."""
    pairs = {pair: distances(*(one_process[name] for name in pair)) for pair in combinations(PRECISIONS, 2)}
    for pair, found in pairs.items():
        logger.info("%s and %s: %s", *pair, in_short(found))
    return {name: max(found[name] for found in pairs.values()) for name in MEASURED}


def in_short(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in row.items())


def is_rounded(numbers: list) -> bool:
    return torch.equal(flat(numbers), flat(numbers).bfloat16().double())


@pytest.mark.parametrize("kind", ON_ONE_PROCESS)
def test_in_bfloat16_ten_steps_are_within_the_distance_of_two_precisions(
    kind, models, one_process, of_precisions, tmp_path
):
    report = launch(SCRIPT, kind, processes=2, folder=tmp_path, mixed_precision="bf16", draws=DRAWS, batch=2, **models)
    runs = with_weights(report, tmp_path)
    for precision, wanted in one_process.items():
        logger.info("%s, from %s: %s", kind, precision, in_short(distances(runs, wanted)))
    found = distances(runs, one_process[ON_ONE_PROCESS[kind]])
    logger.info("%s, ratios: %s", kind, in_short({name: found[name] / of_precisions[name] for name in MEASURED}))
    for name in MEASURED:
        assert found[name] <= of_precisions[name], (
            f"{name}: {found[name]:.2g} from one process, two precisions are {of_precisions[name]:.2g} apart"
        )
    for run in runs.values():
        check_numbers(run)
        check_saved(run, rounded=kind.startswith("zero"))
    loaded = roles_alone(tmp_path / "saved", models["model"], PRECISIONS[ON_ONE_PROCESS[kind]][1])
    apart = {name: rms(flat(loaded[name]) - flat(report["roles"][name])) for name in loaded}
    logger.info("%s, roles that are loaded alone: %s", kind, in_short(apart))
    for name, value in apart.items():
        assert value <= of_precisions[name], f"{name} of a role that is loaded alone: {value:.2g} from the run's"


def check_numbers(run: dict) -> None:
    """That all of it trains, and that heads and log-probabilities are in float32."""
    assert (flat(run["log_probs"]) - flat(run["reference_log_probs"])).abs().max() < 0.02  # adapters start as nothing
    assert (flat(run["trained_values"]) - flat(run["values"])).abs().mean() > 1
    assert (flat(run["trained_log_probs"]) - flat(run["log_probs"])).abs().max() > 0.1
    assert run["loss"][-1] < run["loss"][0] / 4
    for name in (*BEFORE_TRAINING, "trained_log_probs", "trained_values"):
        assert not is_rounded(run[name]), f"{name}: each number is one of bf16"


def check_saved(run: dict, rounded: bool) -> None:
    """That what is saved are the float32 weights that the optimizer steps, under ZeRO in bf16."""
    weights = {name: weight.bfloat16() if rounded else weight for name, weight in run["weights"].items()}
    assert torch.equal(flat(run["saved"]), flat(weights))


def roles_alone(folder: Path, model: str, dtype: str) -> dict[str, list]:
    """What the saved roles compute on one process, each loaded by itself."""
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    critic, reward_model = (
        load_reward_model(folder / name, for_scoring=True, dtype=dtype).eval()
        for name in ("value_model", "reward_model")
    )
    return numbers_of_roles(
        model,
        PeftModel.from_pretrained(base, folder).eval(),
        lambda **batch: critic(**batch, output_token_scores=True).token_scores,
        reward_model,
    )
