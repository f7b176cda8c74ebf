"""What upstream says and our readers need not read is left out; everything else of the same loggers stays."""

import logging
import subprocess
import sys
import warnings

import pytest

from trl_vlm.scripts.quiet import LEFT_OUT, silence

REPORT = """LlavaForSequenceClassification LOAD REPORT from: sft
Key          | Status  |
-------------+---------+-
{name} | MISSING |
"""
SAID = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: none",
    "DeepSpeed": "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
    "transformers.modeling_utils": REPORT.format(name="score.weight"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_known_message_is_left_out_and_others_of_its_logger_are_not(name):
    silence()
    logger, records = logging.getLogger(name), []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        logger.warning(SAID[name])
        logger.warning("Something is wrong")
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == ["Something is wrong"]


@pytest.mark.parametrize("name", ["lm_head.weight", "score.weight | MISSING |\nmodel.norm.weight"])
def test_a_report_about_any_other_weight_is_shown(name):
    assert not LEFT_OUT["transformers.modeling_utils"](REPORT.format(name=name))


def test_upstreams_deprecation_of_its_own_option_is_no_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]


@pytest.mark.slow
def test_the_scripts_are_imported_in_silence():
    code = "import trl_vlm.scripts.dpo, trl_vlm.demo"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
