"""The interface of pair sources: they get rows, and a model that is ready to generate."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from PIL.Image import Image

from trl_vlm.data.errors import RowError
from trl_vlm.data.images import load_image
from trl_vlm.data.messages import message_text
from trl_vlm.data.rows import IMAGE_COLUMNS, Row, check_columns, check_row, name_of, row_images
from trl_vlm.models.generation import Policy
from trl_vlm.pairs.draws import Draws

# Rows that a source gets at once. A decoding step of a 7B model takes a GPU as long for a hundred replies as for one.
PAIR_BATCH_SIZE = 32


class PairSource(Protocol):
    """Makes preference rows of rows, without gradient.

    Rows are never modified, and one call does not change what another returns. A source that may give None counts the
    reasons in its attribute `dropped`.
    """

    def __call__(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | None]:
        """A preference row for each row, or None where there is no decision.

        Args:
            rows: B rows with `prompt`, `images` and, where a source needs a reference reply, `completion` (or else
                `chosen`). `row_name` is what errors call a row and what its random draws depend on.
            policy: The model that makes the replies, ready for it: evaluation mode, adapters on, gathered if it is
                sharded.
            round: Number of the refresh; a row has different random draws in each round.

        Returns:
            B entries. A preference row has the columns of its row, `chosen`, `rejected`, perhaps `rejected_extra`,
            and columns `pair_*` with plain values that say what happened; `pair_source` is always there.
        """
        ...


class Deferred(NamedTuple):
    """A row whose pair is made later, together with rows of other batches.

    finish: Makes the pairs of rows by their states; a method of the source.
    state: What it needs to know of this row.
    """

    finish: Callable[[Sequence[Any], Policy], list[Row | None]]
    state: Any


@runtime_checkable
class DeferringSource(Protocol):
    """A pair source that leaves its last and slowest work for later, where rows of many batches do it together.

    A row's pair is the same as from a call of the source.
    """

    def begin(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | Deferred | None]:
        """As a call of the source, but a row may be `Deferred`."""
        ...


@runtime_checkable
class SurveyingSource(Protocol):
    """A pair source that has to see all rows of a dataset before it makes a pair."""

    def survey(self, rows: Iterable[Row]) -> None:
        """Looks at all rows, which have their names; `PairWriter` calls it on every process."""
        ...


def begin_pairs(
    source: PairSource, rows: Sequence[Row], policy: Policy, round: int = 0
) -> list[Row | Deferred | None]:
    """What a source makes of a batch, with what it leaves for later."""
    if isinstance(source, DeferringSource):
        return source.begin(rows, policy, round)
    return cast(list[Row | Deferred | None], source(rows, policy, round))


def finish_pairs(entries: Sequence[Row | Deferred | None], policy: Policy) -> list[Row | None]:
    """The entries of any number of batches, with pairs in place of what was left for later."""
    pairs = list(entries)
    # By what finishes them: methods of one source are equal.
    waiting: dict[Callable[[Sequence[Any], Policy], list[Row | None]], dict[int, Any]] = {}
    for place, entry in enumerate(entries):
        if isinstance(entry, Deferred):
            waiting.setdefault(entry.finish, {})[place] = entry.state
    for finish, states in waiting.items():
        for place, pair in zip(states, finish(list(states.values()), policy), strict=True):
            pairs[place] = pair
    return cast(list[Row | None], pairs)


def make_pairs(
    source: PairSource, rows: Sequence[Row], policy: Policy, round: int = 0, *, batch_size: int
) -> list[Row | None]:
    """The pairs of any number of rows: a source gets `batch_size` at a time, and finishes what it left over together.

    Raises:
        ValueError: The source gave another number of entries than it got rows.
    """
    pairs: list[Row | None] = []
    waiting: list[Row | Deferred | None] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        entries = begin_pairs(source, batch, policy, round)
        if len(entries) != len(batch):
            raise ValueError(
                f"The pair source {source!r} gave {len(entries)} entries for {len(batch)} rows. It must give one per "
                "row: a preference row, or None where there is no decision."
            )
        waiting += entries
        if sum(isinstance(entry, Deferred) for entry in waiting) >= batch_size:
            pairs += finish_pairs(waiting, policy)
            waiting = []
    return pairs + finish_pairs(waiting, policy)


def row_draws(row: Row, index: int, seed: int, round: int) -> Draws:
    """The random draws of a row; without a name they depend on its index in the batch."""
    return Draws(seed, round, name_of(row, index))


def reference_reply(row: Row, name: str) -> str:
    """The text of the reference reply y+: the row's `completion`, or else its `chosen`.

    Raises:
        RowError: The row has neither, the reply is empty, or it is no list of one assistant message.
    """
    column = "completion" if row.get("completion") is not None else "chosen"
    if row.get(column) is None:
        raise RowError(
            f"{name}: there is no reference reply. It needs the column 'completion' or 'chosen', with one assistant "
            f"message; it has {sorted(row)}."
        )
    check_columns(row, [column], name=name)
    if len(row[column]) != 1 or row[column][0]["role"] != "assistant":
        raise RowError(
            f"{name}, column {column!r}: it has the turns {[message['role'] for message in row[column]]}. A reference "
            "reply is one assistant message; put the turns before it into 'prompt'."
        )
    return message_text(row[column][0])


def check_source_row(row: Row, name: str, image_tokens: Sequence[str]) -> None:
    """Raises the first fault in what sources read of a row: its prompt, its images, and a reply if it has one.

    Args:
        row: A row of a dataset.
        name: What it is called in errors.
        image_tokens: What stands for an image in a text of the model that makes the replies.

    Raises:
        RowError: Naming the row.
    """
    read = {column: row[column] for column in ("prompt", *IMAGE_COLUMNS) if column in row}
    check_row(read, "ppo", name=name, image_tokens=image_tokens, with_images=True)
    replies = [column for column in ("completion", "chosen") if row.get(column) is not None]
    check_columns(row, replies[:1], name=name, image_tokens=image_tokens)


def images_of(row: Row, name: str, max_pixels: int | None) -> list[Image]:
    """The decoded images of a row that has a prompt, [] if it has none.

    Raises:
        RowError: There is no prompt, or an image is bad; the error names the row.
    """
    check_columns(row, ["prompt"], name=name)
    return [
        load_image(image, name=f"{name}, image {number}", max_pixels=max_pixels)
        for number, image in enumerate(row_images(row, name))
    ]
