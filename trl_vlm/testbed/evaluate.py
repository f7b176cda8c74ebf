"""Captions of a model in memory, and its numbers on the testbed's benchmarks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from trl_vlm.evaluation.benchmark import Record
from trl_vlm.evaluation.replies import replies_in_batches
from trl_vlm.evaluation.tasks import read_tasks
from trl_vlm.models.generation import Policy, generated
from trl_vlm.models.masked_images import masked_inputs
from trl_vlm.testbed.benchmark import CAPTIONS, QUESTIONS, SAMPLED, Scenes, scenes_benchmarks
from trl_vlm.testbed.datasets import user
from trl_vlm.testbed.processor import encode_texts
from trl_vlm.testbed.world import REQUEST


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Scenes | None = None,
    *,
    batch_size: int = 64,
) -> dict[str, dict[str, float]]:
    """The numbers of the testbed's benchmarks, of a model in memory: those of `trl-vlm evaluate` on its folder.

    Args:
        model: The model; its training mode is restored.
        processor: Its processor.
        scenes: What it describes and is asked about; the default scenes if None.
        batch_size: Replies per call of `generate`.

    Returns:
        As a report takes them, see `by_split`. Adversarial scores are left out where no scene allows an adversarial
        question.
    """
    policy = Policy(model, processor)
    benchmarks = scenes_benchmarks(scenes or Scenes())
    measured = {}
    for task in read_tasks(benchmarks, Path()):
        asked = task.questions
        batches = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
        replies = [reply for made in replies_in_batches(policy, task, batches) for reply in made]
        records = [
            Record(question.id, question.group, question.text, reply, question.truth, is_finished)
            for question, (reply, is_finished) in zip(asked, replies, strict=True)
        ]
        measured[task.benchmark.name] = task.benchmark.score(records).metrics
    return by_split(measured)


def by_split(measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The numbers of the testbed's benchmarks as a report takes them: `adv_recall` under "adv, greedy".

    The questions of a split belong to both styles of it.

    Args:
        measured: Benchmark to its numbers.
    """
    styles = {CAPTIONS.name: ("greedy",), SAMPLED.name: ("sampled",), QUESTIONS.name: ("greedy", "sampled")}
    splits: dict[str, dict[str, float]] = {}
    for name, values in measured.items():
        for key, value in values.items():
            split, _, metric = key.partition("_")
            for style in styles[name]:
                splits.setdefault(f"{split}, {style}", {})[metric] = value
    return splits


def generate_captions(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image],
    *,
    sample: bool = False,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 40,
    batch: int = 512,
    hide_images: bool = False,
) -> list[str]:
    """One reply to "describe the image" per image, greedy or sampled from the whole vocabulary.

    Torch's global generator is left as it was.

    Args:
        model: The model.
        processor: Its processor.
        images: What is described.
        sample: Whether replies are sampled.
        seed: Of the samples.
        temperature: Of the samples.
        max_new_tokens: Longest reply.
        batch: Images at once.
        hide_images: Hide every image token from attention: what is said then is the language prior.
    """
    request = encode_texts(processor, [[user(REQUEST)]]).input_ids  # (1, T): the same for all

    def batches() -> Iterator[dict[str, Tensor]]:
        for pixels in _pixels(processor, images).split(batch):
            ids = request.expand(len(pixels), -1)
            inputs = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": pixels.to(model.dtype),
            }
            yield masked_inputs(model, inputs, ids == processor.image_token_id) if hide_images else inputs

    replies = generated(
        Policy(model, processor),
        batches(),
        max_new_tokens=max_new_tokens,
        temperature=temperature if sample else 0.0,
        seed=seed if sample else None,
    )
    return [reply.text for reply in replies]


def caption_sampler(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    temperature: float = 1.0,
    max_new_tokens: int = 40,
) -> Callable[[list[Image], int], list[str]]:
    """A model as the source of replies for `datasets.preference_rows`: (images, seed) -> sampled replies."""
    options = {"temperature": temperature, "max_new_tokens": max_new_tokens}

    def sample(images: list[Image], seed: int) -> list[str]:
        return generate_captions(model, processor, images, sample=True, seed=seed, **options)

    return sample


def _pixels(processor: LlavaProcessor, images: Sequence[Image]) -> Tensor:
    return processor.image_processor(list(images), return_tensors="pt")["pixel_values"]  # (B, 3, 48, 48)
