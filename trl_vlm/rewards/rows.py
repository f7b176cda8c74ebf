"""What a reward model judges, made of what TRL passes to a reward function."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from trl_vlm.data.errors import RowTypeError
from trl_vlm.data.messages import Conversation, content_parts, message_text, without_empty_keys
from trl_vlm.rewards.replies import column_values, row_names


class JudgedRow(NamedTuple):
    """A prompt and the reply to it.

    Args:
        name: What errors call the row.
        prompt: Messages up to the reply, with bare places for the images.
        completion: The messages of the reply, one at least; their contents are strings.
        images: The images, in the order of their places, in any form that `load_image` reads.
        facts: What is known about the images.
    """

    name: str
    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    images: list[object]
    facts: Sequence[str]


def judged_rows(
    prompts: Sequence[Conversation],
    completions: Sequence[Conversation],
    *,
    images: Sequence[Sequence[object] | None] | None = None,
    image: Sequence[object] | None = None,
    facts: Sequence[Sequence[str] | None] | None = None,
    row_name: Sequence[str] | None = None,
) -> list[JudgedRow]:
    """One row per reply; the arguments are those of `RewardModelReward.__call__`.

    Raises:
        RowTypeError: A prompt, reply or list of facts has the wrong form.
        ValueError: A column has another number of values than there are replies.
    """
    count = len(completions)
    names = row_names(row_name, count)
    pictures = _images_of_rows(images, image, count)
    known = column_values("facts", facts, count, default=())
    return [_judged_row(*values) for values in zip(names, prompts, completions, pictures, known, strict=True)]


def _judged_row(
    name: str, prompt: Conversation, completion: Conversation, images: list[object], facts: Sequence[str]
) -> JudgedRow:
    for part, value in (("prompt", prompt), ("reply", completion)):
        if isinstance(value, str):
            raise RowTypeError(
                f"{name}: the {part} is a plain string. The reward model judges conversations: pass a list of "
                'messages, for example [{"role": "user", "content": "What is in the picture?"}].'
            )
    if isinstance(facts, str) or not all(isinstance(fact, str) for fact in facts):
        raise RowTypeError(f"{name}: `facts` is {facts!r}. Pass a list of strings, one per fact, or None.")
    prompt, found = _without_images(prompt)
    # A completion without any turn is an empty reply: the judge turn must not follow the user's.
    reply = [{"role": turn["role"], "content": message_text(turn)} for turn in completion]
    return JudgedRow(name, prompt, reply or [{"role": "assistant", "content": ""}], found or images, facts)


def _images_of_rows(images: Sequence | None, image: Sequence | None, rows: int) -> list[list[object]]:
    if images is not None:
        return [list(row) for row in column_values("images", images, rows, default=())]
    return [[] if one is None else [one] for one in column_values("image", image, rows, default=None)]


def _without_images(prompt: Conversation) -> tuple[list[dict[str, Any]], list[object]]:
    """A prompt with its images replaced by placeholders, and the images."""
    # Arrow gives every part the same keys, so a placeholder may hold `image: None`.
    prompt = without_empty_keys(prompt)
    found = [part["image"] for part in content_parts(prompt) if part["type"] == "image" and "image" in part]
    return [_with_bare_places(message) for message in prompt], found


def _with_bare_places(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        content = [{"type": "image"} if part["type"] == "image" else part for part in content]
    return {**message, "content": "" if content is None else content}
