"""Types of what trainers take and hold, each named once."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Model = PreTrainedModel | PeftModel
Processor = PreTrainedTokenizerBase | ProcessorMixin
Rows = Dataset | IterableDataset
EvaluationRows = Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Dataset | IterableDataset]
Environments = Callable[[], Any] | dict[str, Callable[[], Any]]
RewardFunction = str | PreTrainedModel | Callable[..., list[float | None]]
Optimizers = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]


def gathered(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The tensors of all processes in one, along the first dimension; accelerate's own says nothing of types."""
    values = accelerator.gather(tensor)
    assert isinstance(values, Tensor)
    return values


def summed(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    total = accelerator.reduce(tensor, reduction="sum")
    assert isinstance(total, Tensor)
    return total


def base_model(model: Model) -> PreTrainedModel:
    """The model without PEFT's wrapper."""
    if not isinstance(model, PeftModel):
        return model
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    return inner
