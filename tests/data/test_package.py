"""What is imported when: reading, checking and converting rows must not wait for torch."""

import subprocess
import sys

import pytest

import trl_vlm.data

HEAVY = ("torch", "transformers", "trl", "peft")
LIGHT = ("", ".checks", ".rows", ".messages", ".images", ".facts", ".answers", ".named_rows", ".converters")
LIGHT_IO = (".io.source", ".io.output", ".io.shards", ".io.card")


@pytest.mark.parametrize("module", LIGHT + LIGHT_IO)
def test_reading_and_checking_rows_loads_no_model_library(module):
    code = f"import sys, trl_vlm.data{module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("module", ["", ".checks", ".rows", ".messages", ".images", ".facts"])
def test_a_row_is_checked_without_the_library_of_datasets(module):
    code = f"import sys, trl_vlm.data{module}; print('datasets' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_every_public_name_loads_on_first_use():
    for name in trl_vlm.data.__all__:
        assert getattr(trl_vlm.data, name).__name__ == name
    assert set(trl_vlm.data.__all__) <= set(dir(trl_vlm.data))


def test_an_unknown_name_is_an_error_that_lists_what_there_is():
    with pytest.raises(AttributeError, match="has no attribute 'Rows'. It offers: JudgeTemplate, RewardCollator"):
        trl_vlm.data.Rows  # noqa: B018
