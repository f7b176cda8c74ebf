"""This package's models as a model of lmms-eval: full weights or a PEFT adapter, with the processor of the training.

lmms-eval finds it by the entry point `lmms_eval.models`: `lmms-eval --model trl_vlm --model_args pretrained=FOLDER`.
Imported by lmms-eval alone, which is no dependency.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from accelerate import PartialState
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from tqdm.auto import tqdm

from trl_vlm.data.encoding import prompt_batches
from trl_vlm.data.images import load_image
from trl_vlm.data.rows import Row
from trl_vlm.models.generation import generated_batches, load_policy

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024  # where a task sets none
PARAGRAPH = "\n\n"  # the default stop text, which would cut descriptions after their first paragraph
PLAIN = {"top_p": (None, 0, 1), "top_k": (None, 0), "num_beams": (None, 1)}  # values that change nothing


class Instance(Protocol):
    """A request of lmms-eval."""

    # text, settings of the generation, function from a document to its images, number of the document, task, split
    args: tuple[str, Mapping[str, Any], Any, int, str, str]


class TrlVlm(lmms):
    """A model of this package that lmms-eval asks.

    Decoding is greedy, or plain sampling where a task asks for samples; see `trl_vlm.models.generation`.

    Args:
        pretrained: Folder or hub id: all weights, or a PEFT adapter.
        batch_size: Requests per call of `generate`.
        dtype: Precision of the model.
        seed: Seed of samples.
        device: Not used: accelerate chooses the device.
        max_batch_size: Not used.
        unknown: Refused.

    Raises:
        ValueError: An argument is unknown.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str = "auto",
        seed: int | str = 0,
        device: str | None = None,
        max_batch_size: int | str | None = None,
        **unknown: object,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"`--model_args` of trl_vlm has {sorted(unknown)}. It takes pretrained, dtype and seed.")
        self.batch_size, self.seed = int(batch_size), int(seed)
        self.policy = load_policy(pretrained, dtype)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return PartialState().process_index

    @property
    def world_size(self) -> int:
        """Number of processes, which lmms-eval divides the requests among."""
        return PartialState().num_processes

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The replies, in the order of the requests.

        Requests with equal settings are answered together, those with large images first.
        """
        groups: dict[tuple[int, float], list[int]] = {}
        for place, request in enumerate(requests):
            settings = request.args[1]
            _check_settings(settings, request.args[4])
            groups.setdefault((_longest(settings), _temperature(settings)), []).append(place)
        replies = [""] * len(requests)
        with tqdm(total=len(requests), desc="trl_vlm: replies", disable=self.rank > 0 or None) as bar:
            for (longest, temperature), places in groups.items():
                rows = {place: self._row(requests[place]) for place in places}
                ordered = sorted(places, key=lambda place: (-_pixels(rows[place]), place))
                for batch, said in self._replies(ordered, rows, longest, temperature):
                    for place, text in zip(batch, said, strict=True):
                        replies[place] = _until(text, requests[place].args[1].get("until"))
                    bar.update(len(batch))
        return replies

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: choose the generating form of the task."""
        raise NotImplementedError("trl_vlm replies with text; tasks that compare log-likelihoods are not supported.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("trl_vlm answers tasks of one round.")

    def _row(self, request: Instance) -> Row:
        text, _, to_visual, document, task, split = request.args
        visuals = to_visual(self.task_dict[task][split][document]) or []
        images = [
            load_image(image, name=f"{task}, document {document}, image {place}")
            for place, image in enumerate(visuals)
        ]
        content = text.replace("<image>", "").strip() if images else text
        return {"prompt": [{"role": "user", "content": content}], "images": images}

    def _replies(self, places: Sequence[int], rows: Mapping[int, Row], longest: int, temperature: float) -> Any:
        """The places of each batch, with its replies."""
        ordered = [rows[place] for place in places]
        names = [f"request {place}" for place in places]
        made = generated_batches(
            self.policy,
            prompt_batches(self.policy.processor, ordered, batch_size=self.batch_size, names=names),
            max_new_tokens=longest,
            temperature=temperature,
            seed=self.seed if temperature else None,
        )
        for start, replies in zip(range(0, len(places), self.batch_size), made, strict=True):
            yield places[start : start + self.batch_size], [reply.text for reply in replies]


def _longest(settings: Mapping[str, Any]) -> int:
    return int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or MAX_NEW_TOKENS)


def _temperature(settings: Mapping[str, Any]) -> float:
    temperature = float(settings.get("temperature") or 0.0)
    return temperature if settings.get("do_sample", temperature > 0) else 0.0


def _check_settings(settings: Mapping[str, Any], task: str) -> None:
    odd = {name: settings[name] for name, plain in PLAIN.items() if settings.get(name) not in plain}
    if odd.pop("num_beams", None) is not None:
        raise ValueError(f"the task {task} asks for beam search; trl_vlm decodes greedily or samples.")
    if odd and _temperature(settings):
        raise ValueError(
            f"the task {task} samples with {odd}; trl_vlm samples from the model itself. Set them to 1, 0."
        )


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text up to the first stop text."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop and stop != PARAGRAPH:
            text = text.split(stop)[0]
    return text


def _pixels(row: Row) -> int:
    return sum(image.width * image.height for image in row["images"])
