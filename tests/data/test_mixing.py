import json
from collections import Counter

import pyarrow
import pyarrow.parquet as parquet
import pytest
from datasets import Image, List, load_dataset

from tests.data.converters.helpers import image_folder, llava_conversations, rlaif_v, write_vqav2
from trl_vlm.cli import main as cli
from trl_vlm.data.checks import check_dataset
from trl_vlm.data.converters import Source, convert
from trl_vlm.data.io.output import Output
from trl_vlm.data.mixing import Ingredient, mix


@pytest.fixture
def world(tmp_path):
    """Forty conversations in four shards, and three questions in one file."""
    names = [f"COCO_train2014_{name:012d}.jpg" for name in (9, 42)]
    images = image_folder(tmp_path / "images", "000000333333.jpg", *names)
    records = [llava_conversations(id=str(place)) for place in range(40)]
    (tmp_path / "talks.json").write_text(json.dumps(records))
    settings = {"images": images, "progress": False}
    talks, questions = Source(str(tmp_path / "talks.json")), Source(str(write_vqav2(tmp_path / "vqav2")))
    convert("llava-conversations", talks, tmp_path / "talks", turns="last", shard_records=10, **settings)
    convert("llava-conversations", talks, tmp_path / "whole", turns="all", **settings)
    convert("llava-conversations", talks, tmp_path / "parts", turns="last", image_places="parts", **settings)
    convert("vqav2", questions, tmp_path / "questions.parquet", **settings)
    return tmp_path


def run(world, talks=1.0, questions=1.0, output="mix", **more):
    parts = [Ingredient(str(world / "talks"), talks), Ingredient(str(world / "questions.parquet"), questions)]
    return mix(parts, world / output, progress=False, **more)


def ids(path):
    return [row["id"] for row in Source(str(path)).records()]


def test_weights_say_how_often_each_row_occurs(world):
    report = run(world, 0.5, 3)
    assert report.rows == 29
    assert report.taken == {str(world / "talks"): 20, str(world / "questions.parquet"): 9}
    counts = Counter(ids(world / "mix"))
    assert {counts[name] for name in ("9000", "42001", "42000")} == {3}
    assert sorted(counts.values()) == [1] * 20 + [3] * 3
    run(world, 1.25, output="more")
    counts = Counter(ids(world / "more"))
    assert Counter(counts[str(place)] for place in range(40)) == {1: 30, 2: 10}


def test_the_mix_hangs_on_its_seed_alone(world):
    run(world, 0.5)
    run(world, 0.5, output="again.parquet", shard_rows=3)
    run(world, 0.5, output="text.jsonl")
    assert ids(world / "mix") == ids(world / "again.parquet") == ids(world / "text.jsonl")
    run(world, 0.5, output="other", seed=1)
    assert ids(world / "mix") != ids(world / "other")
    assert set(ids(world / "mix")) != set(ids(world / "other"))  # other rows, too, not the same in another order


def test_the_rows_are_spread_and_each_dataset_keeps_its_order(world):
    run(world, 1, 10)
    mixed = ids(world / "mix")
    assert [name for name in mixed if len(name) < 3] == [str(place) for place in range(40)]
    halves = [sum(len(name) > 3 for name in half) for half in (mixed[:35], mixed[35:])]
    assert min(halves) > 8, "thirty questions, spread over both halves"


def test_columns_of_one_dataset_are_empty_in_the_rows_of_the_other_and_images_stay_images(world):
    run(world)
    dataset = load_dataset(str(world / "mix"), split="train", cache_dir=str(world / "cache"))
    assert dataset.features["images"] == List(Image())
    assert Counter(dataset["answer"]) == {None: 40, "2": 1, "bed": 1, "yes": 1}
    report = check_dataset(Source(str(world / "mix")).records(), "sft")
    assert report.problems == [] and (report.rows, report.images) == (43, 43)
    run(world, output="fewer", drop=["answer"])
    assert set(next(Source(str(world / "fewer")).records())) == {"images", "prompt", "completion", "id"}


class Killed(BaseException):
    """What a kill is to the code that it hits."""


@pytest.mark.parametrize("writes", range(5))
def test_a_killed_run_goes_on_to_the_same_mix(world, monkeypatch, writes):
    run(world, 0.5, 2, output="unbroken")
    method, count = Output.write_part, []

    def dying(self, *arguments):
        count.append(1)
        if len(count) > writes:
            raise Killed
        return method(self, *arguments)

    monkeypatch.setattr(Output, "write_part", dying)
    with pytest.raises(Killed, match="^$"):
        run(world, 0.5, 2, shard_rows=5)
    monkeypatch.undo()
    assert run(world, 0.5, 2, shard_rows=5).rows == 26
    assert ids(world / "mix") == ids(world / "unbroken")
    assert run(world, 0.5, 2).was_done


def test_other_weights_do_not_replace_what_is_there(world):
    run(world)
    with pytest.raises(FileExistsError, match="exists. Choose another output"):
        run(world, 0.5)
    assert run(world, 0.5, overwrite=True).rows == 23


def test_rows_that_no_trainer_takes_together_are_refused(world):
    (world / "pairs.json").write_text(json.dumps([rlaif_v(image="000000333333.jpg")]))
    convert("rlaif-v", Source(str(world / "pairs.json")), world / "pairs", images=world / "images", progress=False)
    for other, fault in {
        "whole": r"have \['prompt', 'completion'\], those of .*whole' \['messages'\].*`turns` of conversations",
        "pairs": r"those of .*pairs' \['prompt', 'chosen', 'rejected'\]",
        "parts": "The column 'prompt' is .*`image_places`",
    }.items():
        with pytest.raises(ValueError, match=fault):
            mix([Ingredient(str(world / "talks")), Ingredient(str(world / other))], world / "mix", progress=False)
    table = pyarrow.Table.from_pylist([{**row, "id": 3} for row in Source(str(world / "questions.parquet")).records()])
    parquet.write_table(table, world / "numbers.parquet")
    parts = [Ingredient(str(world / "talks")), Ingredient(str(world / "numbers.parquet"))]
    with pytest.raises(ValueError, match="The column 'id' is .*string.* and .*int64.*or drop it"):
        mix(parts, world / "mix", progress=False)
    assert mix(parts, world / "mix", drop=["id"], progress=False).rows == 43


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_takes_nothing_is_refused(world, weight):
    with pytest.raises(ValueError, match="it must be above 0"):
        run(world, weight)


def test_what_cannot_be_mixed_is_refused(world):
    with pytest.raises(FileNotFoundError, match=r"There is no \.parquet file.*talks\.json"):
        Ingredient(str(world / "talks.json"))
    with pytest.raises(FileNotFoundError, match="There is no .parquet file"):
        Ingredient("owner/name")
    with pytest.raises(ValueError, match="nothing to mix"):
        mix([], world / "mix")
    with pytest.raises(ValueError, match="The weights take no row"):
        mix([Ingredient(str(world / "questions.parquet"), 0.1)], world / "mix")


def test_the_command_line_takes_weights_behind_the_names(world, capsys):
    command = ["mix", "--input", f"{world / 'talks'}=0.25", str(world / "questions.parquet")]
    assert cli.main([*command, "--output", str(world / "mix"), "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"13 rows in {world / 'mix'}", f"10 of {world / 'talks'}", f"3 of {world / 'questions.parquet'}"]
    assert cli.main([*command, "--output", str(world / "mix"), "--seed", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["was_done"]
    odd = world / "a=b.parquet"
    odd.write_bytes((world / "questions.parquet").read_bytes())
    assert cli.main(["mix", "--input", str(odd), "--output", str(world / "odd")]) == 0
