import json

import pytest

from tests.data.converters.helpers import image_folder
from trl_vlm.data.checks import check_dataset
from trl_vlm.data.converters import Source, convert
from trl_vlm.evaluation.benchmarks import BENCHMARKS


@pytest.fixture
def annotations(tmp_path):
    """Two images in one split, one without instances, and one image in another split without captions."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    categories = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 10, "name": "traffic light"}]
    images = [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
        {"id": 9, "file_name": "COCO_val2014_000000000009.jpg"},
    ]
    instances = [{"image_id": 42, "category_id": each, "bbox": [0, 0, 1, 1]} for each in (18, 18, 10)]
    write(folder / "instances_val2014.json", images=images, annotations=instances, categories=categories)
    captions = [
        {"image_id": number, "caption": text} for number, text in ((42, "A puppy. "), (9, "A man."), (42, "Red."))
    ]
    write(folder / "captions_val2014.json", images=images, annotations=captions)
    image = {"id": 7, "file_name": "COCO_train2014_000000000007.jpg"}
    instance = {"image_id": 7, "category_id": 18}
    write(folder / "instances_train2014.json", images=[image], annotations=[instance], categories=categories)
    return folder


def write(path, **lists):
    path.write_text(json.dumps({"info": {}, **lists}))


def test_each_image_has_its_classes_once_and_its_captions_as_facts(annotations, tmp_path):
    report = convert("coco-objects", Source(str(annotations)), tmp_path / "coco_objects.jsonl", progress=False)
    assert (report.records, report.rows) == (3, 3)
    rows = list(Source(report.output).records())
    assert [(row["image_id"], row["objects"], row["facts"]) for row in rows] == [
        (7, ["dog"], []),
        (9, [], ["A man."]),
        (42, ["dog", "traffic light"], ["A puppy.", "Red."]),
    ]
    assert rows[2]["images"] == ["COCO_val2014_000000000042.jpg"]


@pytest.mark.parametrize("output", ["coco_objects.jsonl", "coco_objects.parquet", "coco_objects"])
def test_the_rows_are_what_the_benchmarks_read(annotations, tmp_path, output):
    data = tmp_path / "data"
    image_folder(data / "val2014", "COCO_val2014_000000000042.jpg", "COCO_val2014_000000000009.jpg")
    (annotations / "instances_train2014.json").unlink()
    convert("coco-objects", Source(str(annotations)), data / output, images=data / "val2014", progress=False)
    assert check_dataset(Source(str(data / output)).records(), "ppo").problems == []
    questions = BENCHMARKS["chair"].read(data)
    assert [question.truth["objects"] for question in questions] == [["person"], ["dog", "traffic light"]]


def test_a_folder_without_annotations_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no instances_\*.json"):
        convert("coco-objects", Source(str(tmp_path)), tmp_path / "rows.jsonl", progress=False)
    (tmp_path / "instances_x.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        convert("coco-objects", Source(str(tmp_path)), tmp_path / "rows.jsonl", progress=False)
    (tmp_path / "instances_x.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="has no lists"):
        convert("coco-objects", Source(str(tmp_path)), tmp_path / "rows.jsonl", progress=False)
