"""Replies of any vision-language model to rows with prompts and images, and to the questions of a benchmark."""

from collections.abc import Iterator, Sequence

from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from trl_vlm.data.encoding import prompt_batches
from trl_vlm.data.images import load_image
from trl_vlm.data.rows import Row
from trl_vlm.evaluation.benchmark import Question
from trl_vlm.evaluation.tasks import Task
from trl_vlm.models.generation import Policy, generated, generated_batches
from trl_vlm.models.sampling import GumbelSampler


def generate_replies(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    seed: int | None = None,
    progress: bool = True,
) -> list[str]:
    """One reply per row: greedy, or a plain sample at temperature 1 if `seed` is given.

    What a checkpoint sets for generation (a repetition penalty, top-k) is not applied; see `models.generation`.

    Args:
        model: A generative model; it is in evaluation mode while it generates.
        processor: Its processor.
        rows: Rows with `prompt` and, if they have any, `images`.
        batch_size: Rows per call of `generate`.
        max_new_tokens: Longest reply, in tokens.
        seed: Seed of the samples; torch's global generator is left as it was.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A row's image is broken or does not match its placeholders; the error names the row.
    """
    batches = prompt_batches(processor, rows, batch_size=batch_size)
    replies = generated(
        Policy(model, processor),
        tqdm(batches, desc="replies", total=-(-len(rows) // batch_size), disable=not progress),
        max_new_tokens=max_new_tokens,
        temperature=0.0 if seed is None else 1.0,
        seed=seed,
    )
    return [reply.text for reply in replies]


def replies_to(
    policy: Policy, task: Task, questions: Sequence[Question], *, synced_gpus: bool | None = None
) -> list[tuple[str, bool]]:
    """Replies to the questions as one batch, and whether each ended by itself: greedy, or samples by their seeds."""
    return list(replies_in_batches(policy, task, [questions], synced_gpus=synced_gpus))[0]


def replies_in_batches(
    policy: Policy, task: Task, batches: Sequence[Sequence[Question]], *, synced_gpus: bool | None = None
) -> Iterator[list[tuple[str, bool]]]:
    """As `replies_to`, for one batch after the other; the model is prepared for generation once."""
    encoded = (_encoded(policy, task, questions) for questions in batches)
    seeds = [question.seed for questions in batches for question in questions]
    sampler = None if all(seed is None for seed in seeds) else GumbelSampler(seeds)
    settings = {"max_new_tokens": task.max_new_tokens, "sampler": sampler, "synced_gpus": synced_gpus}
    for replies in generated_batches(policy, encoded, **settings):
        yield [(reply.text, reply.is_finished) for reply in replies]


def _encoded(policy: Policy, task: Task, questions: Sequence[Question]) -> dict[str, Tensor]:
    names = [f"{task.benchmark.name}, question {question.id}" for question in questions]
    rows = [task.row(question) for question in questions]
    return next(prompt_batches(policy.processor, rows, batch_size=len(rows), names=names))


def shared_out(questions: Sequence[Question], batch_size: int) -> Iterator[list[Question]]:
    """This process's batches, of questions of similar size, the largest first: memory runs out at once or never."""
    state = PartialState()
    sizes: dict[str, int] = {}
    ordered = sorted(questions, key=lambda question: (-_pixels(question, sizes), -len(question.text), question.id))
    starts = range(0, len(ordered), batch_size)
    for start in starts[state.process_index :: state.num_processes]:
        yield ordered[start : start + batch_size]


def _pixels(question: Question, known: dict[str, int]) -> int:
    """Pixels of a question's images; the header of a file is read once."""
    total = 0
    for place, value in enumerate(question.images):
        key = value if isinstance(value, str) else ""
        if key and key in known:
            total += known[key]
            continue
        name = f"question {question.id}, image {place}"
        size = _header_size(value) or load_image(value, name=name).size
        total += size[0] * size[1]
        if key:
            known[key] = size[0] * size[1]
    return total


def _header_size(value: object) -> tuple[int, int] | None:
    if not isinstance(value, str):
        return None
    try:
        with Image.open(value) as image:
            return image.size
    except (OSError, SyntaxError):  # `load_image` names what is wrong
        return None
