"""Whole datasets: read from every kind of input, written to every kind of output, resumed, and counted."""

import dataclasses
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, Features, Image, List, load_dataset
from PIL import Image as PILImage

from tests.data.converters.helpers import (
    FACTS,
    NLF_COLUMNS,
    a_okvqa,
    annotated,
    fact_rlhf,
    hsa_dpo,
    image_folder,
    llava_conversations,
    llava_preference,
    mdpo,
    mmpr,
    multimodal_rewardbench,
    nlf,
    png,
    povid,
    rlaif_v,
    rlhf_v,
    vl_rewardbench,
    vlfeedback,
)
from trl_vlm.cli import main as cli
from trl_vlm.data.checks import check_dataset
from trl_vlm.data.converters import CONVERTERS, BadRecord, MissingColumns, Source, convert
from trl_vlm.data.converters import conversion as conversion_module
from trl_vlm.data.io.output import STATE_FILE


def numbered(count):
    return [rlaif_v(idx=str(number), chosen=f"A red cup, number {number}.") for number in range(count)]


def write_parquet(path, records):
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    return Source(str(path))


def write_json(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return Source(str(path))


def loaded(path):
    return list(load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path) + ".cache"))


@pytest.fixture
def world(tmp_path):
    """The images and facts that the records of `converter_records` name."""
    image_folder(tmp_path / "images", "bus.png", "COCO_train2014_000000000009.jpg", "000000000042.jpg")
    image_folder(tmp_path / "images", "000000111111.jpg", "000000222222.jpg", "000000333333.jpg", "7.jpg")
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    return tmp_path


EVERY_CONVERTER = {
    "rlhf-v": ([rlhf_v()], {}),
    "rlaif-v": ([rlaif_v()], {}),
    "vlfeedback": ([vlfeedback([("5", "5", "5"), ("N/A", "3", "3"), ("1", "1", "1")])], {}),
    "povid": ([povid()], {}),
    "llava-human-preference": ([llava_preference()], {"facts": "facts.json"}),
    "nlf": ([nlf()], NLF_COLUMNS),
    "fact-rlhf": ([fact_rlhf()], {"facts": "facts.json"}),
    "annotations": ([annotated()], {}),
    "vl-rewardbench": ([vl_rewardbench()], {}),
    "multimodal-rewardbench": ([multimodal_rewardbench()], {}),
    "llava-conversations": ([llava_conversations()], {"turns": "last"}),
    "mmpr": ([mmpr()], {}),
    "hsa-dpo": ([hsa_dpo()], {}),
    "mdpo": ([mdpo()], {}),
    "a-okvqa": ([a_okvqa()], {}),
}
PURPOSES = {"fact-rlhf": "ppo", "llava-conversations": "sft", "a-okvqa": "sft"}


@pytest.mark.parametrize("name", [name for name, converter in CONVERTERS.items() if converter.reader is None])
@pytest.mark.parametrize("output", ["rows", "rows.parquet", "rows.jsonl"])
def test_every_converter_writes_rows_that_pass_the_check(world, name, output):
    records, options = EVERY_CONVERTER[name]
    if "facts" in options:
        options = {"facts": world / options["facts"]}
    source = write_parquet(world / "in.parquet", records)
    report = convert(name, source, world / output, images=world / "images", progress=False, **options)
    assert (report.records, report.rows) == (1, 1)
    assert report.dropped == ({"rating is not a number from 1 to 5": 1} if name == "vlfeedback" else {})
    checked = check_dataset(Source(str(world / output)).records(), PURPOSES.get(name, "dpo"))
    assert checked.problems == []
    assert (checked.rows, checked.images) == (1, 1)
    assert not (world / f"{output}.partial").exists()


@pytest.mark.parametrize("file", ["in.parquet", "in.json", "in.jsonl"])
def test_rows_do_not_depend_on_the_format_of_the_input(world, file):
    records = [povid(id=str(number)) for number in range(5)]
    write = write_parquet if file.endswith("parquet") else write_json
    convert("povid", write(world / file, records), world / "rows.parquet", images=world / "images", progress=False)
    rows = loaded(world / "rows.parquet")
    assert [row["id"] for row in rows] == list("01234")
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "A bowl."}]
    assert rows[0]["images"][0].size == (12, 8)


def test_a_folder_of_shards_loads_as_a_data_set_with_images(world):
    source = write_parquet(world / "in.parquet", numbered(7))
    report = convert("rlaif-v", source, world / "rows", shard_records=3, progress=False)
    assert report.rows == 7
    files = sorted(path.name for path in (world / "rows").iterdir())
    assert files == [STATE_FILE, "train-00000.parquet", "train-00001.parquet", "train-00002.parquet"]
    dataset = load_dataset(str(world / "rows"), split="train", cache_dir=str(world / "cache"))
    assert dataset["idx"][:] == list("0123456")
    assert dataset.features["images"] == List(Image())
    assert isinstance(dataset[6]["images"][0], PILImage.Image)


def test_hub_data_sets_and_folders_are_streamed_with_their_images_undecoded(world):
    # A folder goes through the same `load_dataset(..., streaming=True)` as a hub id.
    (world / "hub").mkdir()
    features = Features({"image": Image(), "text": CONVERTERS["rlhf-v"].columns["idx"]})
    rows = [{"image": {"bytes": png(), "path": None}, "text": rlhf_v(chosen=f"{n} dogs.")["text"]} for n in range(3)]
    for split in ("train", "test"):
        Dataset.from_list(rows, features=features).to_parquet(world / "hub" / f"{split}-0.parquet")
    with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\]; got None. Choose with `split`"):
        convert("rlhf-v", Source(str(world / "hub")), world / "rows.parquet", progress=False)
    source = Source(str(world / "hub"), split="test")
    assert next(source.records())["image"] == {"bytes": png(), "path": None}
    assert convert("rlhf-v", source, world / "rows.parquet", limit=2, progress=False).rows == 2
    assert [row["chosen"][0]["content"] for row in loaded(world / "rows.parquet")] == ["0 dogs.", "1 dogs."]


def test_a_folder_that_was_saved_to_disk_is_read(world):
    Dataset.from_list(numbered(3)).save_to_disk(world / "saved")
    assert convert("rlaif-v", Source(str(world / "saved")), world / "rows.parquet", progress=False).rows == 3


def test_images_can_be_stored_with_the_rows(world):
    source = write_json(world / "in.json", [povid()])
    convert("povid", source, world / "a.parquet", images=world / "images", embed_images=True, progress=False)
    convert("povid", source, world / "b.parquet", images=world / "images", progress=False)
    file = world / "images" / "COCO_train2014_000000000009.jpg"
    stored = [parquet.read_table(world / name).to_pylist()[0]["images"][0] for name in ("a.parquet", "b.parquet")]
    assert stored == [{"bytes": file.read_bytes(), "path": file.name}, {"bytes": None, "path": str(file)}]


def test_json_lines_get_their_image_bytes_as_files_once_each(world):
    source = write_parquet(world / "in.parquet", numbered(3))
    convert("rlaif-v", source, world / "rows.jsonl", progress=False)
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    files = list((world / "rows_images").iterdir())
    assert [row["images"] for row in rows] == [[str(files[0])]] * 3
    assert files[0].read_bytes() == png("green")
    with pytest.raises(ValueError, match="JSON Lines cannot hold the bytes of images"):
        convert("rlaif-v", source, world / "other.jsonl", embed_images=True, progress=False)


def test_a_bad_record_stops_the_conversion_and_is_named(world):
    records = [*numbered(2), rlaif_v(image=None), rlaif_v(chosen="")]
    source = write_parquet(world / "in.parquet", records)
    with pytest.raises(BadRecord, match=r"in.parquet, record 2: missing image.*`skip_bad` leaves such records out"):
        convert("rlaif-v", source, world / "rows", progress=False)
    assert not (world / "rows").exists()


def test_bad_records_are_left_out_and_counted_when_that_is_asked_for(world):
    records = [rlaif_v(image=None), *numbered(2), rlaif_v(chosen=""), rlaif_v(image={"bytes": b"x", "path": None})]
    records += [rlaif_v(image=None), rlaif_v(image={"bytes": None, "path": "gone.jpg"})]
    report = convert(
        "rlaif-v", write_parquet(world / "in.parquet", records), world / "rows", skip_bad=True, progress=False
    )
    assert (report.records, report.rows) == (7, 2)
    assert report.dropped == {
        "missing image": 2,
        "empty chosen reply": 1,
        "not an image": 1,
        "image file not found": 1,
    }


def test_another_schema_is_an_error_even_where_bad_records_are_skipped(world):
    source = write_json(world / "in.json", [{"picture": "a.jpg", "caption": "A cat."}])
    with pytest.raises(MissingColumns, match=r"record 0: missing columns.*Found the columns \['caption', 'picture'\]"):
        convert("rlhf-v", source, world / "rows", skip_bad=True, progress=False)


def test_a_data_set_that_gives_no_row_is_an_error_with_the_counts(world):
    tied = vlfeedback([("3", "3", "3"), ("3", "3", "3")])
    with pytest.raises(ValueError, match=r"None of 1 records .* made a row: \{'tie': 1\}"):
        convert("vlfeedback", write_json(world / "in.json", [tied]), world / "rows", progress=False)


class StopHere(Exception):
    pass


def interrupted(world, monkeypatch, at_record, **settings):
    """A conversion of ten records that dies after reading `at_record` of them."""
    source = write_parquet(world / "in.parquet", numbered(10))
    read, original = [], conversion_module.stored_image

    def dying(value, **options):
        read.append(value)
        if len(read) > at_record:
            raise StopHere
        return original(value, **options)

    monkeypatch.setattr(conversion_module, "stored_image", dying)
    with pytest.raises(StopHere):
        convert("rlaif-v", source, world / "rows", shard_records=3, progress=False, **settings)
    monkeypatch.setattr(conversion_module, "stored_image", original)
    return source


def test_an_interrupted_conversion_goes_on_where_it_stopped(world, monkeypatch):
    source = interrupted(world, monkeypatch, at_record=7)
    assert not (world / "rows").exists()
    starts = []
    original = Source.records

    def watched(self, skip=0, limit=None):
        starts.append(skip)
        return original(self, skip, limit)

    monkeypatch.setattr(Source, "records", watched)
    report = convert("rlaif-v", source, world / "rows", shard_records=3, progress=False)
    assert starts == [6]
    assert (report.records, report.rows) == (10, 10)
    assert [row["idx"] for row in loaded(world / "rows" / "*.parquet")] == list("0123456789")


def test_an_unfinished_conversion_is_not_mixed_with_another_one(world, monkeypatch):
    source = interrupted(world, monkeypatch, at_record=7)
    with pytest.raises(ValueError, match=r"unfinished conversion that differs in \['limit'\]"):
        convert("rlaif-v", source, world / "rows", limit=4, progress=False)
    write_parquet(world / "in.parquet", numbered(11))
    with pytest.raises(ValueError, match=r"differs in \['source'\]"):
        convert("rlaif-v", Source(source.location), world / "rows", progress=False)
    assert convert("rlaif-v", Source(source.location), world / "rows", overwrite=True, progress=False).rows == 11


def test_a_killed_conversion_leaves_nothing_half_written(world):
    source = write_parquet(world / "in.parquet", numbered(40))
    script = (
        "import os, sys; from trl_vlm.data.converters import Source, convert; from trl_vlm.data.io import output\n"
        "replace, calls = os.replace, []\n"
        "def dying(old, new):\n"
        "    calls.append(new)\n"
        "    if len(calls) == int(sys.argv[1]): os.kill(os.getpid(), 9)\n"
        "    replace(old, new)\n"
        "output.os.replace = dying\n"
        "convert('rlaif-v', Source(sys.argv[2]), sys.argv[3], shard_records=10, progress=False)\n"
    )
    # Ten renamings: a shard and the state, four times, the state at the end, the destination.
    died = subprocess.run([sys.executable, "-c", script, "6", source.location, str(world / "rows")])
    assert died.returncode == -9
    assert not (world / "rows").exists()
    assert convert("rlaif-v", source, world / "rows", shard_records=10, progress=False).rows == 40
    assert [row["idx"] for row in loaded(world / "rows" / "*.parquet")] == [str(number) for number in range(40)]


@pytest.mark.parametrize("output", ["rows", "rows.parquet", "rows.jsonl"])
def test_a_finished_output_is_replaced_only_when_that_is_asked_for(world, output):
    source = write_parquet(world / "in.parquet", numbered(2))
    convert("rlaif-v", source, world / output, progress=False)
    with pytest.raises(FileExistsError, match="exists. Choose another output, or pass `overwrite`"):
        convert("rlaif-v", source, world / output, limit=1, progress=False)
    assert convert("rlaif-v", source, world / output, limit=1, overwrite=True, progress=False).rows == 1
    assert check_dataset(Source(str(world / output)).records(), "dpo").rows == 1


@pytest.mark.parametrize("output", ["rows", "rows.parquet", "rows.jsonl"])
def test_a_finished_conversion_that_is_repeated_is_done_and_reads_nothing(world, output, monkeypatch):
    source = write_parquet(world / "in.parquet", [*numbered(2), rlaif_v(chosen="")])
    first = convert("rlaif-v", source, world / output, skip_bad=True, progress=False)
    monkeypatch.setattr(Source, "records", None)
    again = convert("rlaif-v", source, world / output, skip_bad=True, progress=False)
    assert again == dataclasses.replace(first, was_done=True) and not first.was_done
    command = ["convert", "--from", "rlaif-v", "--input", source.location, "--output", str(world / output)]
    assert cli.main([*command, "--skip-bad"]) == 0


@pytest.mark.parametrize("output", ["rows", "rows.parquet", "rows.jsonl"])
def test_a_finished_output_that_was_damaged_since_is_not_taken_for_done(world, output):
    source = write_parquet(world / "in.parquet", numbered(4))
    convert("rlaif-v", source, world / output, shard_records=2, progress=False)
    damaged = world / output if "." in output else world / "rows" / "train-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(FileExistsError, match=f"but .*{damaged.name}.* Pass `overwrite` to make it again"):
        convert("rlaif-v", source, world / output, shard_records=2, progress=False)
    report = convert("rlaif-v", source, world / output, shard_records=2, overwrite=True, progress=False)
    assert report.rows == check_dataset(Source(str(world / output)).records(), "dpo").rows == 4


def test_a_folder_of_someone_else_is_never_replaced(world):
    source = write_parquet(world / "in.parquet", numbered(1))
    with pytest.raises(FileExistsError, match="a folder that no conversion wrote"):
        convert("rlaif-v", source, world / "images", overwrite=True, progress=False)
    assert (world / "images" / "bus.png").exists()


@pytest.mark.parametrize(
    ("name", "settings", "fault"),
    [
        ("coco", {}, "no converter 'coco'. There are: rlhf-v, rlaif-v"),
        ("rlhf-v", {"pairs": "all"}, "rlhf-v has no option pairs. It has: none"),
        ("vlfeedback", {"facts": "facts.json"}, "vlfeedback has no option facts. It has: pairs, min_gap, aspects"),
        ("povid", {"images": "nowhere"}, "folder of images 'nowhere' does not exist"),
        ("fact-rlhf", {"facts": "nowhere.json"}, "facts file 'nowhere.json' does not exist"),
    ],
)
def test_settings_that_make_no_sense_are_refused(world, name, settings, fault):
    with pytest.raises((ValueError, FileNotFoundError), match=fault):
        convert(name, write_json(world / "in.json", [povid()]), world / "rows", progress=False, **settings)


@pytest.mark.parametrize(("text", "fault"), [("[1, 2]", "holds a list"), ('{"a": ', "is not JSON")])
def test_a_facts_file_that_is_none_is_refused(world, text, fault):
    (world / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=fault):
        convert("fact-rlhf", write_json(world / "in.json", [fact_rlhf()]), world / "rows", facts=world / "bad.json")


def test_an_output_of_an_unknown_kind_is_refused(world):
    with pytest.raises(ValueError, match="cannot be written as .csv. Give a folder, or a file that ends in .parquet"):
        convert("povid", write_json(world / "in.json", [povid()]), world / "rows.csv", progress=False)
