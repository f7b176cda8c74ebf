"""The row contract: which columns a dataset may have, and errors that name the row and the column.

Images are not decoded here; that happens where a batch is made (`trl_vlm.data.images`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset as TorchDataset

Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
ROW_NAME = "row_name"  # the column that carries what a row is called in errors
IMAGE_COLUMNS = ("images", "image")
MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion")
REPLY_COLUMNS = ("chosen", "rejected", "completion")


def row_images(row: Row, name: str) -> list[Any]:
    """Returns the row's images, not decoded: the `images` list, or the one `image`; [] if it has none.

    Args:
        row: A row of a dataset.
        name: What the row is called in errors, for example "row 12".

    Raises:
        ValueError: The row has both columns filled.
        TypeError: `images` is no list.
    """
    images, image = row.get("images"), row.get("image")
    if images is not None and image is not None:
        raise ValueError(f"{name}: both 'images' and 'image' are filled. Keep the list in 'images' and drop 'image'.")
    if image is not None:
        return [image]
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        raise TypeError(
            f"{name}: 'images' is a {type(images).__name__}. It must be a list, [] for a row without; "
            "a single image goes into the column 'image'."
        )
    return list(images)


def check_rows(dataset: Dataset | IterableDataset | Sequence[Row], required: Iterable[str], *, name: str) -> None:
    """Checks columns, and every row of a dataset that has a length, without decoding images.

    A streamed dataset is checked by its columns only, where they are known; its rows are checked batch by batch.

    Args:
        dataset: The rows.
        required: Columns that must be there.
        name: What the dataset is called in errors, for example "train".

    Raises:
        ValueError: The dataset is empty, a column is missing, or a row breaks the contract.
        TypeError: A value of a row has the wrong type.
    """
    required = list(required)
    columns = dataset.column_names if isinstance(dataset, Dataset | IterableDataset) else None
    if columns is not None:
        _check_columns(columns, required, name)
    if isinstance(dataset, IterableDataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"The {name} dataset is empty. Check the path, the split and the filters it came through.")
    if isinstance(dataset, Dataset):
        # Iterating would decode the images; their number is checked against the placeholders at collation.
        dataset = dataset.remove_columns([column for column in IMAGE_COLUMNS if column in dataset.column_names])
    for index, row in enumerate(dataset):
        check_row(row, required, name=f"{name} row {index}")


def check_row(row: Row, required: Iterable[str], *, name: str) -> None:
    """Checks one row: required columns, messages, replies that say something, facts, margin.

    Raises:
        ValueError, TypeError: Naming the row and the column.
    """
    for column in required:
        if row.get(column) is None:
            raise ValueError(f"{name}: the column {column!r} is missing or None. It has {sorted(row)}.")
    for column in MESSAGE_COLUMNS:
        if row.get(column) is not None:
            _check_messages(row[column], f"{name}, column {column!r}")
    for column in REPLY_COLUMNS:
        if row.get(column) is not None and not message_text(row[column][-1]).strip():
            raise ValueError(f"{name}, column {column!r}: the reply is empty. Drop the row, or fill the reply in.")
    _check_facts(row.get("facts"), name)
    margin = row.get("margin")
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"{name}, column 'margin': {margin} is not a finite number. Use 0.0 for no margin.")


def message_text(message: Mapping[str, Any]) -> str:
    """Returns the text of a message, whether its content is a string or a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or ())


class NamedRows(TorchDataset):
    """A dataset whose rows say what they are called ("train row 12", in the column `row_name`) and decode no image.

    Decoding then happens where a batch is made, and a broken file is reported by its row. The table is not copied,
    which `add_column` and `cast_column` would do for a shuffled dataset or a list of images.

    Args:
        dataset: The rows.
        name: What the dataset is called in errors.
        numbers: Which rows to keep; None keeps all.
    """

    def __init__(self, dataset: Dataset, name: str, numbers: Sequence[int] | None = None):
        self.rows = _relabelled(dataset)
        self.name = name
        self.numbers = range(len(dataset)) if numbers is None else list(numbers)

    @property
    def column_names(self) -> list[str]:
        """The dataset's columns and `row_name`."""
        return [*self.rows.column_names, ROW_NAME]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = self.numbers[place]
        return {**self.rows[number], ROW_NAME: f"{self.name} row {number}"}


def named_rows(dataset: Dataset | IterableDataset, name: str) -> "NamedRows | IterableDataset":
    """Returns the dataset with `row_name` and without decoding of images; a streamed one stays streamed."""
    if isinstance(dataset, Dataset):
        return NamedRows(dataset, name)
    for column in IMAGE_COLUMNS:
        if column in (dataset.features or ()):
            dataset = dataset.cast_column(column, _undecoded(dataset.features[column]))
    return dataset.map(lambda _, index: {ROW_NAME: f"{name} row {index}"}, with_indices=True)


def _undecoded(feature: Any) -> Any:
    """The same feature, with images as {"bytes", "path"}."""
    if isinstance(feature, ImageFeature):
        return ImageFeature(decode=False)
    if isinstance(feature, ListFeature):
        return ListFeature(_undecoded(feature.feature))
    return feature


def _relabelled(dataset: Dataset) -> Dataset:
    """The same table with undecoded image columns."""
    info = dataset.info.copy()
    info.features = Features(
        {
            column: _undecoded(feature) if column in IMAGE_COLUMNS else feature
            for column, feature in dataset.features.items()
        }
    )
    # The order of a shuffled dataset, and its identity, have no public names; `cast_column` and `cast` would write
    # a list of images to a new table. A test watches for it.
    fingerprint = Hasher.hash([dataset._fingerprint, "undecoded"])
    return Dataset(
        dataset.data, info=info, split=dataset.split, indices_table=dataset._indices, fingerprint=fingerprint
    )


def _check_columns(columns: Sequence[str], required: Sequence[str], name: str) -> None:
    missing = [column for column in required if column not in columns]
    if missing:
        raise ValueError(
            f"The {name} dataset lacks the column(s) {missing}; it has {list(columns)}. "
            "Rename or add them (`dataset.rename_column`); docs/data.md lists the columns of each trainer."
        )


def _check_messages(messages: Any, name: str) -> None:
    if isinstance(messages, str) or not isinstance(messages, list | tuple):
        raise TypeError(
            f"{name}: it is a {type(messages).__name__}. It must be a list of messages, "
            'for example [{"role": "user", "content": "What is this?"}].'
        )
    if not messages:
        raise ValueError(f"{name}: the list of messages is empty. It needs at least one message.")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(
                f"{name}: {message!r} is not a message. It needs a 'role' ({', '.join(ROLES)}) and 'content'."
            )
        if not isinstance(message.get("content"), str | list | tuple):
            raise TypeError(
                f"{name}: the content of the {message['role']} turn is a {type(message.get('content')).__name__}. "
                "It must be a string, or a list of parts such as {'type': 'text', 'text': ...}."
            )


def _check_facts(facts: Any, name: str) -> None:
    if facts is None:
        return
    if isinstance(facts, str) or not isinstance(facts, list | tuple):
        raise TypeError(f"{name}, column 'facts': it is a {type(facts).__name__}. It must be a list of strings.")
    for fact in facts:
        if not isinstance(fact, str) or not fact.strip():
            raise ValueError(
                f"{name}, column 'facts': {fact!r} is not a fact. Each one is a string that says something."
            )
