"""Rows chosen by a column, and samples: the same rows whatever was read before, and after a kill."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.data.converters.helpers import (
    image_folder,
    llava_conversations,
    llava_preference,
    rlaif_v,
    vlfeedback,
)
from trl_vlm.cli import main as cli
from trl_vlm.data.converters import CONVERTERS, Source, convert
from trl_vlm.data.converters.selection import Sample, Where
from trl_vlm.data.io.lock import OutputInUse
from trl_vlm.data.io.output import Output

RECORDS = 60


@pytest.fixture
def world(tmp_path):
    image_folder(tmp_path / "images", "7.png", "bus.png", "000000111111.jpg", "000000333333.jpg")
    records = [rlaif_v(idx=str(place), chosen=f"Cup {place}.", image="7.png") for place in range(RECORDS)]
    write(tmp_path / "in.json", records)
    return tmp_path


def write(file, records):
    file.write_text("\n".join(map(json.dumps, records)) if file.suffix == ".jsonl" else json.dumps(records))


def run(world, output="rows.parquet", source="in.json", name="rlaif-v", **more):
    settings = {"images": world / "images", "progress": False, **more}
    return convert(name, Source(str(world / source)), world / output, **settings)


def rows(path):
    return list(Source(str(path)).records())


def numbers(path):
    return [int(row["idx"]) for row in rows(path)]


def test_a_sample_has_so_many_rows_in_their_order_and_the_rest_is_counted(world):
    report = run(world, sample=20)
    drawn = numbers(world / "rows.parquet")
    assert len(set(drawn)) == 20 and drawn == sorted(drawn) and drawn != list(range(20))
    assert (report.records, report.rows, report.dropped) == (RECORDS, 20, {"not in the sample": 40})


def test_a_sample_hangs_on_its_seed_alone(world):
    run(world, sample=20)
    records = [rlaif_v(idx=str(place), chosen=f"Cup {place}.", image="7.png") for place in range(RECORDS)]
    write(world / "in.jsonl", records)
    for output, more in {
        "a": {"shard_records": 7},
        "b.jsonl": {"shard_records": 1},
        "c.parquet": {"source": "in.jsonl"},
        "d.parquet": {"embed_images": True},
    }.items():
        run(world, output, sample=20, **more)
        assert numbers(world / output) == numbers(world / "rows.parquet")
    run(world, "e.parquet", sample=20, seed=1)
    assert numbers(world / "e.parquet") != numbers(world / "rows.parquet")


def test_a_larger_sample_holds_the_smaller_one_and_a_too_large_one_is_everything(world):
    run(world, "a", sample=10)
    run(world, "b", sample=30)
    assert set(numbers(world / "a")) < set(numbers(world / "b"))
    assert run(world, "c", sample=1000).rows == RECORDS


def test_every_row_is_drawn_equally_often():
    counts = [0] * 20
    for seed in range(400):
        for number, _ in Sample(5, seed).drawn([1] * 20):
            counts[number] += 1
    # 100 each; the standard deviation of a count is 8.7.
    assert sum(counts) == 2000 and all(70 < count < 130 for count in counts)


def test_rows_of_one_record_are_drawn_one_by_one(world):
    write(world / "talks.json", [llava_conversations() for _ in range(30)])
    report = run(world, "talks", "talks.json", "llava-conversations", sample=25)
    assert (report.records, report.rows) == (30, 25)
    lengths = [len(row["prompt"]) for row in rows(world / "talks")]
    assert 0 < lengths.count(1) < 25


def test_bad_records_are_never_drawn_and_still_stop_the_conversion(world):
    records = json.loads((world / "in.json").read_text())
    for place in range(0, RECORDS, 2):
        records[place]["chosen"] = ""
    write(world / "in.json", records)
    report = run(world, sample=20, skip_bad=True)
    assert (report.rows, report.dropped) == (20, {"empty chosen reply": 30, "not in the sample": 10})
    with pytest.raises(ValueError, match="record 0: empty chosen reply"):
        run(world, "strict", sample=20)


class Killed(BaseException):
    """What a kill is to the code that it hits."""


@pytest.mark.parametrize("writes", range(1, 6))
def test_a_killed_run_goes_on_to_the_same_sample(world, monkeypatch, writes):
    run(world, "whole", sample=20)
    method, count = Output.write_part, []

    def dying(self, *arguments):
        count.append(1)
        if len(count) > writes:
            raise Killed
        return method(self, *arguments)

    monkeypatch.setattr(Output, "write_part", dying)
    with pytest.raises(Killed, match="^$"):
        run(world, "rows", sample=20, shard_records=10)
    monkeypatch.undo()
    report = run(world, "rows", sample=20, shard_records=10)
    assert numbers(world / "rows") == numbers(world / "whole")
    assert (report.rows, report.dropped) == (20, {"not in the sample": 40})


def test_an_unfinished_sample_is_not_mixed_with_another(world, monkeypatch):
    monkeypatch.setattr(Output, "finish", None)
    with pytest.raises(TypeError, match="not callable"):
        run(world, sample=20)
    monkeypatch.undo()
    for more, fault in (({"sample": 21}, "sample"), ({"sample": 20, "seed": 1}, "sample"), ({}, "sample")):
        with pytest.raises(ValueError, match=rf"unfinished conversion that differs in \['{fault}'\]"):
            run(world, **more)
    with pytest.raises(ValueError, match=r"differs in \['where'\]"):
        run(world, sample=20, where={"idx": ["1"]})


@pytest.mark.slow
def test_of_two_processes_one_writes_the_sample_and_the_other_is_refused(world):
    run(world, "whole", sample=20)
    script = (
        "import sys; from trl_vlm.data.converters import Source, convert; from trl_vlm.data.io.output import Output\n"
        "write = Output.write_part\n"
        "def slow(self, *arguments):\n"
        "    print('writing', flush=True); sys.stdin.readline(); return write(self, *arguments)\n"
        "Output.write_part = slow\n"
        "convert('rlaif-v', Source(sys.argv[1]), sys.argv[2], images=sys.argv[3], sample=20, progress=False)\n"
    )
    command = [sys.executable, "-c", script, str(world / "in.json"), str(world / "rows"), str(world / "images")]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "writing\n"
    with pytest.raises(OutputInUse, match=str(first.pid)):
        run(world, "rows", sample=20)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert run(world, "rows", sample=20).rows == 20
    assert numbers(world / "rows") == numbers(world / "whole")


def test_only_rows_with_a_value_are_kept(world):
    records = [llava_preference(id=str(place), hallucination=place % 3 == 0) for place in range(9)]
    write(world / "pairs.json", records)
    where = {"hallucination": ["true"]}
    report = run(world, "pairs", "pairs.json", "llava-human-preference", where=where)
    assert [row["id"] for row in rows(world / "pairs")] == ["0", "3", "6"]
    assert report.dropped == {"hallucination is not true": 6}
    report = run(world, "drawn", "pairs.json", "llava-human-preference", where=where, sample=2)
    assert report.rows == 2 and {row["id"] for row in rows(world / "drawn")} < {"0", "3", "6"}
    assert report.dropped == {"hallucination is not true": 6, "not in the sample": 1}


def test_values_of_the_record_serve_where_the_row_has_no_such_column(world):
    write(
        world / "in.json", [rlaif_v(idx=str(n), origin_dataset=name, image="7.png") for n, name in enumerate("aabc")]
    )
    run(world, where={"origin_dataset": ["a", "c"], "ds_name": ["RLAIF-V"]})
    assert numbers(world / "rows.parquet") == [0, 1, 3]
    with pytest.raises(
        ValueError, match=r"`where` names the column 'origin'. The row has \['chosen'.*, and its record \['chosen'"
    ):
        run(world, "other", where={"origin": ["a"]}, skip_bad=True)


def test_the_model_of_the_chosen_reply_is_chosen_on_the_command_line(world, capsys):
    write(world / "rated.json", [vlfeedback([("5", "5", "5"), ("3", "3", "3"), ("1", "1", "1")])])
    command = ["convert", "--from", "vlfeedback", "--input", str(world / "rated.json"), "--images"]
    command += [str(world / "images"), "--output", str(world / "rated"), "--where"]
    assert cli.main([*command, "chosen_model=model-1"]) == 0
    assert "1 records -> 1 rows" in (text := capsys.readouterr().out)
    assert "left out, chosen_model is not model-1: 2" in text
    several = [*command, "chosen_model=model-1", "--where", "chosen_model=model-0", "--sample", "2", "--overwrite"]
    assert cli.main(several) == 0
    assert "left out, not in the sample: 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "model-1"])
    assert "'model-1' is not COLUMN=VALUE" in capsys.readouterr().err


def test_the_command_line_lists_the_datasets(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["convert", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert f"{'a-okvqa':22}  HuggingFaceM4/A-OKVQA" in lines and len(lines) == len(CONVERTERS)


@pytest.mark.parametrize("amount", [0, -3, 1.5])
def test_an_amount_that_is_no_number_of_rows_is_refused(amount):
    with pytest.raises(ValueError, match="Give the number of rows to draw"):
        Sample(amount)
    with pytest.raises(ValueError, match=r"`where` names no value for \['id'\]"):
        Where({"id": []})
