import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from trl_vlm.cli import main as cli
from trl_vlm.cli.convert import CONVERTER_OPTIONS
from trl_vlm.data.converters import CONVERTERS


def rlaif_v(number, image, **changes):
    record = {"image": image, "question": "What is it?", "chosen": f"A cup, {number}.", "rejected": "A fork."}
    return {**record, "idx": str(number), **changes}


@pytest.fixture
def world(tmp_path):
    """A folder with one image, and a JSON file of three records, the second of them without an image."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a.png")
    records = [rlaif_v(0, "a.png"), rlaif_v(1, None), rlaif_v(2, "a.png")]
    (tmp_path / "in.json").write_text(json.dumps(records))
    return tmp_path


def convert(world, *more, output="rows.parquet"):
    command = ["convert", "--from", "rlaif-v", "--input", str(world / "in.json"), "--output", str(world / output)]
    return cli.main([*command, "--images", str(world / "images"), *more])


def test_convert_says_what_it_did_and_left_out(world, capsys):
    assert convert(world, "--skip-bad") == 0
    output = capsys.readouterr().out
    assert output.splitlines() == [f"3 records -> 2 rows in {world / 'rows.parquet'}", "left out, missing image: 1"]


def test_convert_reports_to_programs_as_json(world, capsys):
    assert convert(world, "--skip-bad", "--json", "--limit", "2") == 0
    report = json.loads(capsys.readouterr().out)
    expected = {"output": str(world / "rows.parquet"), "records": 2, "rows": 1, "dropped": {"missing image": 1}}
    assert report == expected | {"was_done": False, "held_out": None}


def test_convert_stops_at_a_bad_record_with_exit_code_one(world, capsys):
    assert convert(world) == 1
    assert "error: " in (error := capsys.readouterr().err)
    assert "in.json, record 1: missing image" in error
    assert not (world / "rows.parquet").exists()


def test_an_unknown_schema_names_the_columns_found(world, capsys):
    (world / "in.json").write_text('[{"picture": "a.png", "caption": "A cup."}]')
    assert convert(world, "--skip-bad") == 1
    assert "Found the columns ['caption', 'picture']; needed are ['image', 'question'" in capsys.readouterr().err


def test_convert_on_several_processes_is_refused_before_anything_is_written(world, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert convert(world, "--skip-bad") == 1
    assert (
        "runs in one process, and a launcher started 2: each would do all of it. Start it" in capsys.readouterr().err
    )
    assert {path.name for path in world.iterdir()} == {"images", "in.json"}
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert convert(world, "--skip-bad") == 0


def test_an_option_of_another_data_set_is_refused(world, capsys):
    assert convert(world, "--min-gap", "1") == 1
    assert "rlaif-v has no option min_gap" in capsys.readouterr().err


def test_options_reach_their_converter(world, capsys):
    record = {"pic": "a.png", "ask": "What is it?", "first": "A fork.", "after": "A cup."}
    (world / "nlf.jsonl").write_text(json.dumps(record) + "\n")
    command = ["convert", "--from", "nlf", "--input", str(world / "nlf.jsonl"), "--output", str(world / "rows.jsonl")]
    command += ["--images", str(world / "images")]
    assert cli.main(command) == 1
    assert "--image-column, --question-column, --refined-column, --initial-column" in capsys.readouterr().err
    names = ["--image-column", "pic", "--question-column", "ask", "--refined-column", "after"]
    assert cli.main([*command, *names, "--initial-column", "first"]) == 0
    assert json.loads((world / "rows.jsonl").read_text())["chosen"] == [{"role": "assistant", "content": "A cup."}]


def test_every_option_of_every_converter_is_on_the_command_line():
    offered = set(CONVERTER_OPTIONS) | {"facts"}
    assert {option for converter in CONVERTERS.values() for option in converter.options} == offered


def test_check_passes_what_convert_wrote(world, capsys):
    convert(world, "--skip-bad", output="rows")
    capsys.readouterr()
    assert cli.main(["check", "--input", str(world / "rows"), "--for", "dpo"]) == 0
    assert capsys.readouterr().out == "2 rows with 2 images for dpo: good\n"


def test_the_input_of_check_may_stand_alone_as_in_earlier_versions(world, capsys):
    convert(world, "--skip-bad", output="rows")
    assert cli.main(["check", str(world / "rows"), "--for", "dpo"]) == 0
    assert cli.main(["check", "--dataset", str(world / "rows"), "--for", "dpo"]) == 0


def broken_rows(world):
    rows = [
        {
            "images": ["a.png"],
            "prompt": [{"role": "user", "content": "What is it?"}],
            "chosen": [{"role": "assistant", "content": reply}],
            "rejected": [{"role": "assistant", "content": "A fork."}],
        }
        for reply in ("A cup.", "", "A fork.")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), world / "bad.parquet")
    return str(world / "bad.parquet")


def test_check_says_what_is_wrong_where_with_exit_code_one(world, capsys):
    command = ["check", broken_rows(world), "--for", "reward", "--images", str(world / "images")]
    assert cli.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("row 1, column 'chosen': the reply is empty.")
    assert lines[1].startswith("warning: row 2, column 'rejected': it says the same as 'chosen'.")
    assert lines[2:4] == ["1 x chosen: the reply is empty", "1 x rejected: the replies are the same"]
    assert lines[4] == "3 rows with 3 images for reward: 1 rows are bad"
    assert cli.main([*command, "--limit", "1"]) == 0


def test_check_reports_to_programs_as_json(world, capsys):
    assert cli.main(["check", broken_rows(world), "--for", "dpo", "--json", "--no-images", "--max-problems", "1"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["good"], report["rows"], report["bad_rows"], report["images"]) == (False, 3, 1, 3)
    assert [(problem["row"], problem["column"]) for problem in report["problems"]] == [(1, "chosen")]
    assert report["counts"] == {"chosen: the reply is empty": 1, "rejected: the replies are the same": 1}


def test_check_finds_a_file_that_is_not_there(capsys):
    assert cli.main(["check", "gone.parquet", "--for", "dpo"]) == 1
    assert "There is no file or folder 'gone.parquet'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "required: command"),
        (["convert", "--output", "x"], "required: --from"),
        (["convert", "--from", "coco", "--output", "x"], "invalid choice: 'coco'"),
        (["check", "x"], "required: --for"),
        (["check", "--for", "dpo"], "one of the arguments --input is required"),
        (["check", "x", "--input", "y", "--for", "dpo"], "not allowed with argument"),
        (["check", "x", "--for", "dpo", "--limit", "0"], "0 is not above 0"),
    ],
)
def test_wrong_usage_ends_with_exit_code_two(arguments, fault, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert fault in capsys.readouterr().err
