"""Reading what TRL hands to a reward function: replies as text, and rows by name."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

Message: TypeAlias = dict[str, Any]
Conversation: TypeAlias = list[Message]

_SHOWN_CHARACTERS = 60


class RewardFunction(Protocol):
    """A TRL reward function: one number per reply, `None` where it does not apply."""

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """One value for each of the `completions`."""
        ...


def content_text(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message's content: a string, or TRL's list of blocks whose images and videos are left out."""
    if content is None:  # an assistant turn that only calls tools
        return ""
    if isinstance(content, str):
        return content
    return "".join(block["text"] for block in content if block["type"] == "text")


def reply_text(completion: str | Conversation) -> str:
    """The text that the policy wrote: the assistant turns of a completion, joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(content_text(turn.get("content")) for turn in completion if turn["role"] == "assistant")


def name_row(row: int, completion: Any) -> str:
    """`row 3 (reply 'There is a ...')`, for error messages; never fails, whatever the completion is."""
    try:
        text = reply_text(completion)
    except (TypeError, KeyError, AttributeError):
        text = repr(completion)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS]}..."
    return f"row {row} (reply {text!r})"


def column_values(name: str, column: Sequence | None, rows: int, default: Any) -> list:
    """A dataset column as one value per row, `default` where the column or its value is missing.

    Raises:
        ValueError: If the column has another number of values than there are replies.
    """
    if column is None:
        return [default] * rows
    if len(column) != rows:
        raise ValueError(
            f"the column `{name}` has {len(column)} values for {rows} replies. Pass one value per reply: TRL repeats "
            "a prompt's columns for each of its replies."
        )
    return [default if value is None else value for value in column]


def required_ids(completion_ids: Sequence[Sequence[int]] | None, reward: str, rows: int) -> list[list[int]]:
    """The replies' token ids, unpadded and with their end-of-reply token.

    Raises:
        ValueError: If they are missing or their number is not that of the replies.
    """
    if completion_ids is None:
        raise ValueError(
            f"`{reward}` counts tokens and got no `completion_ids`. Pass the replies' token ids, unpadded, one list "
            "per reply, as TRL's trainers do."
        )
    if len(completion_ids) != rows:
        raise ValueError(f"`{reward}` got {len(completion_ids)} lists of `completion_ids` for {rows} replies.")
    return [list(ids) for ids in completion_ids]
