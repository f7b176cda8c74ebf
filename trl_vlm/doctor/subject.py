"""The model that is looked at: a generative model, a reward model, or an adapter of either."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.models.loading import base_of, is_adapted, load_generative_model, load_generative_processor, moved
from trl_vlm.models.parts import PARTS, part_of
from trl_vlm.models.place import Place
from trl_vlm.models.reply_ends import with_reply_ends
from trl_vlm.models.reward_model import load_reward_model
from trl_vlm.rewards.reward_model import load_template
from trl_vlm.trainers.types import base_model

_WATCHED = 4  # parameters at the beginning of a part, and as many at its end


@dataclass(frozen=True)
class Subject:
    """A loaded model.

    Args:
        model: In evaluation mode; with an adapter in PEFT's wrapper.
        processor: The model's own.
        template: The judge template of a reward model; None for a generative one.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    template: JudgeTemplate | None = None

    @property
    def inner(self) -> PreTrainedModel:
        """The model without PEFT's wrapper."""
        return base_model(self.model)

    @cached_property
    def trained_processor(self) -> ProcessorMixin:
        """The processor as trainers use it: its replies have an end."""
        return with_reply_ends(self.processor)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model computes in: the lowest of its weights that are not quantized."""
        kinds = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        return min(kinds, key=lambda kind: kind.itemsize)

    def watched_parameters(self) -> list[nn.Parameter]:
        """Some of each part, whose gradients stand for all: they fit beside a model that fills the device."""
        tables = [self.inner.get_input_embeddings(), self.inner.get_output_embeddings()]
        left_out = {id(parameter) for table in tables if table is not None for parameter in table.parameters()}
        watched: list[nn.Parameter] = []
        for part in PARTS:
            own = [
                parameter
                for name, parameter in self.model.named_parameters()
                if part_of(name) == part and parameter.is_floating_point() and id(parameter) not in left_out
            ]
            matrices = [parameter for parameter in own if parameter.dim() == 2] or own
            watched += dict.fromkeys([*matrices[:_WATCHED], *matrices[-_WATCHED:]])
        return watched

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """A context in which no parameter requires gradients."""
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)

    @contextmanager
    def watching(self) -> Iterator[list[nn.Parameter]]:
        """A context in which nothing but the watched parameters requires gradients."""
        with self.frozen():
            watched = self.watched_parameters()
            for parameter in watched:
                parameter.requires_grad_(True)
            yield watched


def load_subject(place: Place, *, dtype: str = "auto", device: str | None = None) -> Subject:
    """Loads a model to look at.

    Args:
        place: Its folder or hub id.
        dtype: Precision of the weights; "auto" is that of the checkpoint.
        device: Where to; None: an accelerator, if there is one.

    Raises:
        ValueError: It is no model that reads images.
    """
    hub, path = place.load_options, place.path
    processor = load_generative_processor(path, **hub)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{path} has a {type(processor).__name__}, which reads no images. `doctor` looks at models that do."
        )
    if is_reward_model(path, **hub):
        model, template = load_reward_model(path, for_scoring=True, dtype=dtype, **hub), _template(path, hub)
    else:
        model, template = load_generative_model(path, dtype=dtype, **hub), None
    return Subject(moved(model, device or _device()).eval(), processor, template)


def is_reward_model(path: str, **hub: Any) -> bool:
    """Whether a folder or hub id holds a sequence classifier, or an adapter of one."""
    if base_of(path, **hub) is not None:
        return PeftConfig.from_pretrained(path, **hub).task_type == "SEQ_CLS"
    classes = AutoConfig.from_pretrained(path, **hub).architectures or ()
    return any(name.endswith("ForSequenceClassification") for name in classes)


def adapter_of(model: nn.Module) -> PeftConfig | None:
    """The configuration of the model's adapter, if it has one."""
    return model.active_peft_config if is_adapted(model) else None


def _template(path: str, hub: dict[str, Any]) -> JudgeTemplate:
    try:
        return load_template(path, **hub)
    except FileNotFoundError:
        return JudgeTemplate.none()


def _device() -> torch.device:
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")
