"""A small world in which hallucination can be measured: scenes, a tiny model that hallucinates, exact truth."""

from trl_vlm.testbed.evaluate import evaluate
from trl_vlm.testbed.processor import JUDGE_TEMPLATE
from trl_vlm.testbed.supervised import SupervisedSettings, train_supervised
from trl_vlm.testbed.world import World

__all__ = ["JUDGE_TEMPLATE", "SupervisedSettings", "World", "evaluate", "train_supervised"]
