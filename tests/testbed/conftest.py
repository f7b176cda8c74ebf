import pytest

from trl_vlm.testbed.model import build_model
from trl_vlm.testbed.processor import build_processor
from trl_vlm.testbed.world import World


@pytest.fixture(scope="session")
def world():
    return World()


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture
def model(processor):
    return build_model(processor, seed=0)
