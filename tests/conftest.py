"""No test may touch the network: the hub is switched off before any library reads its environment."""

import gc
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

if "TORCHVISION_STAND_IN" in os.environ:
    # Before transformers asks whether torchvision is there.
    from tests.torchvision_stand_in import install

    install(os.environ["TORCHVISION_STAND_IN"])

QUICK_FAMILIES = ("llava", "qwen2_5_vl")


def pytest_addoption(parser):
    parser.addoption(
        "--families",
        choices=("all", "quick"),
        default="all",
        help=f"which model families the tests that run for many of them take; quick: {', '.join(QUICK_FAMILIES)}",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks tests that run for one model family each, and leaves out those of other families than asked for.

    Slow ones of other families than the quick ones are for the night.
    """
    if not any(hasattr(item, "callspec") for item in items):
        return
    # They import transformers: not before the environment is set.
    from tests.families import FAMILIES
    from tests.more_families import MORE_FAMILIES

    known = {*FAMILIES, *MORE_FAMILIES}
    left_out = []
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        family = next((value for value in values if isinstance(value, str) and value in known), None)
        if family is None:
            continue
        item.add_marker("family_grid")
        if item.get_closest_marker("slow") and family not in QUICK_FAMILIES:
            item.add_marker("nightly")
        if config.getoption("--families") == "quick" and family not in QUICK_FAMILIES:
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        chosen = set(items) - set(left_out)
        items[:] = [item for item in items if item in chosen]


def pytest_collection_finish():
    """Takes what the imports made out of garbage collection: every `Trainer.train` collects, 0.5 s each time."""
    gc.collect()
    gc.freeze()
