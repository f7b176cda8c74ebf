"""Rows of a dataset that say what they are called and decode no image, and the check of all of them."""

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from datasets.fingerprint import Hasher

from trl_vlm.data.rows import IMAGE_COLUMNS, ROW_NAME, Row, check_row


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


class NamedRows:
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
