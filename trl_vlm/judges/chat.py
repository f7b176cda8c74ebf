"""Language models that answer the requests of judges and of `Corrupted`, wherever the model runs."""

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, NamedTuple, Protocol

from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from trl_vlm.data.encoding import prompt_batches
from trl_vlm.data.messages import without_control_tokens
from trl_vlm.models.generation import Policy, generated
from trl_vlm.models.loading import load_generative_model, load_generative_processor, moved
from trl_vlm.models.processors import control_tokens
from trl_vlm.models.unsharded import is_sharded, unsharded_loading

CUT_OFF = "the answer was cut off"
EMPTY = "the answer was empty"


class Request(NamedTuple):
    """One question to a model.

    Attributes:
        text: The user's turn.
        images: The images that it is about, in any form that `load_image` reads.
        name: What errors call it.
    """

    text: str
    images: Sequence[object]
    name: str


class Answer(NamedTuple):
    """A model's answer: its whole text, or None and the reason in a few words that can be counted."""

    text: str | None
    reason: str = ""


class Chat(Protocol):
    """A model that answers."""

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request; a text that was cut off or is empty does not count."""
        ...


class LocalChat:
    """A vision-language model on this process's device, answering greedily.

    Args:
        model: A generative model, or its folder or hub id (full weights or a PEFT adapter), which is then loaded
            whole on every process, also where the trained model is sharded.
        processor: Its processor; loaded from the same place if None.
        max_new_tokens: Longest answer; a longer one does not count.
        batch_size: Requests per call of `generate`.
        load_options: Passed to `from_pretrained` (`dtype`, `quantization_config`, ...).
    """

    def __init__(
        self,
        model: str | PathLike | PreTrainedModel,
        processor: ProcessorMixin | None = None,
        *,
        max_new_tokens: int = 256,
        batch_size: int = 8,
        **load_options: Any,
    ):
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(f"`max_new_tokens` is {max_new_tokens}, `batch_size` {batch_size}; both must be above 0.")
        source = model if isinstance(model, str | PathLike) else str(model.name_or_path)
        self.processor = processor if processor is not None else load_generative_processor(source, **load_options)
        if isinstance(model, str | PathLike):
            with unsharded_loading():
                self.model = load_generative_model(model, **load_options).eval().requires_grad_(False)
        else:
            self.model = model
        if is_sharded(self.model):
            raise ValueError(
                "The model's parameters are split among the processes (ZeRO-3), so it cannot answer on its own. Pass "
                "its folder or hub id, and it is loaded whole."
            )
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self._control_tokens = control_tokens(self.processor)

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request."""
        replies = generated(
            Policy(self.model, self.processor),
            self.prompts(requests),
            max_new_tokens=self.max_new_tokens,
            # Under ZeRO-3 `generate` would wait for the other processes, which may have nothing to ask.
            synced_gpus=False,
        )
        return [answer(reply.text) if reply.is_finished else Answer(None, CUT_OFF) for reply in replies]

    def prompts(self, requests: Sequence[Request]) -> Iterator[dict[str, Tensor]]:
        """The requests as the model reads them, `batch_size` at a time; the model moves to this process's device."""
        # transformers sets `hf_device_map` on models that it placed itself, quantized ones among them.
        if getattr(self.model, "hf_device_map", None) is None:
            moved(self.model, PartialState().device)
        texts = [without_control_tokens(request.text, self._control_tokens) for request in requests]
        rows = [
            {"prompt": [{"role": "user", "content": text}], "images": list(request.images)}
            for text, request in zip(texts, requests, strict=True)
        ]
        names = [request.name for request in requests]
        return prompt_batches(self.processor, rows, batch_size=self.batch_size, names=names)


def answer(text: str | None) -> Answer:
    """A whole text as an answer."""
    return Answer(text.strip()) if text and text.strip() else Answer(None, EMPTY)
