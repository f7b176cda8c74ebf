import pytest
from datasets import Dataset, IterableDataset

from tests.families import image
from tests.preference_rows import preference_row, preference_rows
from trl_vlm.data.messages import message_text
from trl_vlm.data.named_rows import check_rows, named_rows
from trl_vlm.data.rows import row_images


def test_images_come_from_either_column():
    assert row_images({"images": ["a", "b"]}, "row 0") == ["a", "b"]
    assert row_images({"image": "a"}, "row 0") == ["a"]
    assert row_images({"images": None}, "row 0") == row_images({}, "row 0") == []


def test_contradictory_image_columns_are_errors():
    with pytest.raises(ValueError, match="row 2: both 'images' and 'image'"):
        row_images({"images": ["a"], "image": "a"}, "row 2")
    with pytest.raises(TypeError, match="row 2: 'images' is a str"):
        row_images({"images": "a.png"}, "row 2")


def test_good_rows_pass_in_every_container():
    rows = [preference_row(seed, images=seed) for seed in range(3)]
    check_rows(rows, "reward", name="train")
    check_rows(preference_rows(), "reward", name="train")
    check_rows(IterableDataset.from_generator(lambda: iter(rows)), "reward", name="train")


def test_an_empty_dataset_is_an_error():
    with pytest.raises(ValueError, match="The eval dataset is empty"):
        check_rows(preference_rows().select([]), "reward", name="eval")


def test_a_missing_column_is_an_error_that_lists_what_there_is():
    with pytest.raises(ValueError, match=r"train dataset lacks the column\(s\) \['rejected'\]"):
        check_rows(preference_rows().remove_columns("rejected"), "reward", name="train")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"chosen": [{"role": "assistant", "content": " \n"}]}, ValueError, "'chosen': the reply is empty"),
        ({"rejected": []}, ValueError, "'rejected': the list of messages is empty"),
        ({"rejected": None}, ValueError, "'rejected': it is missing or None"),
        ({"chosen": "a cat"}, TypeError, "'chosen': it is a str"),
        ({"prompt": [{"role": "narrator", "content": "Hm."}]}, ValueError, "'prompt': .* is not a message"),
        ({"prompt": [{"role": "user", "content": 3}]}, TypeError, "'prompt': the content of the user turn is a int"),
        ({"facts": "a red cup"}, TypeError, "'facts': it is a str"),
        ({"facts": ["a red cup", " "]}, ValueError, "'facts': ' ' is not a fact"),
        ({"margin": float("nan")}, ValueError, "'margin': nan is not a finite number"),
    ],
)
def test_a_bad_row_is_an_error_that_names_the_row_and_the_column(changes, error, message):
    rows = [preference_row(0), preference_row(1, **changes)]
    with pytest.raises(error, match=f"train row 1.*{message}"):
        check_rows(rows, "reward", name="train")


def test_text_is_read_from_strings_and_from_parts():
    parts = [{"type": "image"}, {"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]
    assert message_text({"role": "user", "content": parts}) == message_text({"content": "a cat"}) == "a cat"


def test_named_rows_keep_an_order_and_decode_nothing():
    dataset = preference_rows([1, 1, 2, 0]).select([3, 0, 2])  # an order that is not the table's
    rows = named_rows(dataset, "eval")
    assert [row["row_name"] for row in rows] == ["eval row 0", "eval row 1", "eval row 2"]
    assert [len(row["images"]) for row in rows] == [0, 1, 2]
    assert set(rows[1]["images"][0]) == {"bytes", "path"}
    assert [row["chosen"] for row in rows] == list(dataset["chosen"])
    assert "row_name" in rows.column_names and len(rows) == 3


def test_streamed_rows_are_named_and_decode_nothing():
    rows = named_rows(preference_rows().to_iterable_dataset(), "train")
    first = next(iter(rows))
    assert first["row_name"] == "train row 0"
    assert set(first["images"][0]) == {"bytes", "path"}


def test_a_single_image_column_is_not_decoded_either():
    dataset = Dataset.from_list([{"image": image(0), **preference_row(0, 0)}]).remove_columns("images")
    assert set(named_rows(dataset, "train")[0]["image"]) == {"bytes", "path"}
