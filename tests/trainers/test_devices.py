"""Training, scoring and making pairs on an accelerator: the CPU's results, and no tensor on the wrong device.

The accelerator is pretended (`tests/pretend_accelerator.py`), with the values of the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ON_ONE_DEVICE = ("dpo", "dpo on kept features", "ppo", "reward", "scoring", "bdhs", "sampled replies")
ON_TWO_DEVICES = ("shared prefix on two devices", "dpo on two devices")
FAMILIES = ("llava", "qwen2_5_vl")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """All cases, in one process that ends with its devices."""
    file = tmp_path_factory.mktemp("devices") / "report.json"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(Path(__file__).with_name("devices_main.py")), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", [*ON_ONE_DEVICE, *ON_TWO_DEVICES])
def test_the_results_are_those_of_the_cpu_and_devices_do_not_mix(case, family, report):
    wanted, found = (report[where][f"{case}, {family}"] for where in ("cpu", "device"))
    for one in (wanted, found):
        assert "error" not in one, one["error"]
    assert len(wanted["result"]) >= 2
    if case in ("bdhs", "sampled replies"):
        assert found["result"] == wanted["result"]
    else:
        assert found["result"] == pytest.approx(wanted["result"], rel=1e-3, abs=1e-4)
    assert found["waits"] and not wanted["waits"]  # it did run on the device


def test_only_the_generator_of_the_models_device_is_saved_where_draws_are_seeded(report):
    """Saving those of all devices starts a context on each GPU, in each process."""
    assert set(report["saved generators"]) == {"pretend:0"}


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("cpu", "got (2,) on pretend:0, (2,) on cpu"),
        ("other device", "got (2,) on pretend:0, (2,) on pretend:1"),
        ("index", "got (2,) on cpu, (2,) on pretend:0"),
        ("numpy", "NumPy reads no tensor of pretend:0"),
    ],
)
def test_the_pretend_accelerator_refuses_what_a_real_one_refuses(mixture, message, report):
    assert message in report["refusals"][mixture]


@pytest.mark.parametrize("mixture", ["number", "index of the cpu"])
def test_the_pretend_accelerator_takes_what_a_real_one_takes(mixture, report):
    assert report["refusals"][mixture] == ""
