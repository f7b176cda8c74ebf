"""Verdicts: what a number becomes, and what an error becomes."""

import math

import pytest
import torch

from trl_vlm.doctor.findings import Finding, anything_differs, as_json, as_text, attempt, changed, equal, note


@pytest.mark.parametrize(
    ("difference", "dtype", "verdict"),
    [
        (1e-4, torch.float32, "ok"),
        (2e-3, torch.float32, "differs"),
        (2e-3, torch.bfloat16, "ok"),
        (0.2, torch.bfloat16, "differs"),
        (math.nan, torch.bfloat16, "differs"),
    ],
)
def test_the_tolerance_is_that_of_the_precision(difference, dtype, verdict):
    finding = equal("padding", difference, dtype, "scores")
    assert finding.verdict == verdict
    assert str(dtype).removeprefix("torch.") in finding.text and finding.number is difference


@pytest.mark.parametrize(("difference", "verdict"), [(0.5, "ok"), (0.0, "differs"), (math.nan, "differs")])
def test_what_must_change_something_does(difference, verdict):
    finding = changed("pixels", difference, "scores", "the model is blind")
    assert finding.verdict == verdict
    assert ("the model is blind" in finding.text) == (verdict == "differs")


def test_what_a_model_cannot_do_is_a_line_and_a_fault_of_this_package_is_not():
    def fails():
        raise NotImplementedError("no\n  cache here")

    assert attempt("masking", fails) == Finding("masking", "not possible", "NotImplementedError: no cache here")

    def runs_out():
        raise torch.OutOfMemoryError("2 GiB")

    assert "the memory of the device does not suffice (2 GiB)" in attempt("masking", runs_out).text
    with pytest.raises(ZeroDivisionError, match="by zero"):
        attempt("masking", lambda: 1 / 0)


def test_the_report_counts_verdicts_and_is_bad_where_something_differs():
    sections = {"a": [Finding("x", "ok", "1"), note("y", "2")], "b": [Finding("z", "not possible", "3")]}
    assert not anything_differs(sections)
    assert as_text(sections).splitlines()[-1] == "1 ok, 0 differs, 1 not possible"
    sections["b"].append(Finding("v", "differs", "4", 0.5, 0.1))
    assert anything_differs(sections)
    report = as_json(sections)
    assert report["good"] is False and len(report["findings"]) == 4
    assert report["findings"][-1] == {
        **{"section": "b", "name": "v", "verdict": "differs", "text": "4"},
        **{"number": 0.5, "tolerance": 0.1},
    }
