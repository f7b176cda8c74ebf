"""`trl-vlm check --model`: what a model's own processor makes of the rows."""

import json

import pytest

from tests.families import image, load_processor, saved
from trl_vlm.cli import main as cli
from trl_vlm.data.checks import check_dataset
from trl_vlm.data.encoding import encode
from trl_vlm.data.model_check import ModelCheck

FAMILIES = ("llava", "qwen2_5_vl")
ENDS = {"llava": "</s>", "qwen2_5_vl": "<|im_end|>"}


def row(images, question="What is in the image?", **changes):
    given = {
        "images": images,
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": "A cup."}],
        "rejected": [{"role": "assistant", "content": "There is a fork on the left."}],
    }
    return given | changes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows with one image, with none, and with two and a long question."""
    folder = tmp_path_factory.mktemp("rows")
    for number in range(3):
        image(number).save(folder / f"{number}.png")
    rows = [row(["0.png"]), row([]), row(["1.png", "2.png"], "What is it? " * 20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


def check(world, family, *more, purpose="dpo", rows="rows.jsonl"):
    given = ["--input", str(world / rows), "--for", purpose, "--images", str(world)]
    return cli.main(["check", *given, "--model", str(saved(family)), *more])


def report(capsys):
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_how_replies_end_and_how_long_rows_are(family, world, capsys):
    assert check(world, family) == 0
    output = capsys.readouterr().out
    appended = ", appended by the trainers: the chat template leaves replies open"
    assert f"end of a reply: '{ENDS[family]}'{appended if family == 'llava' else ', from the chat template'}" in output
    assert "image tokens per row: 0 at least, " in output and "\ntokens per row: " in output
    assert "rows whose placeholders and images differ, or that the processor refuses: 0" in output
    assert "control tokens: " in output and "<pad>" in output
    assert output.endswith("3 rows with 3 images for dpo: good\n")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("purpose", ["dpo", "reward", "ppo"])
def test_the_lengths_are_those_that_the_model_reads(purpose, family, world, capsys):
    assert check(world, family, "--json", purpose=purpose) == 0
    found = report(capsys)["model"]
    assert found["reply_end"] == ENDS[family] and found["reply_end_is_appended"] == (family == "llava")
    per_image = {"llava": 4, "qwen2_5_vl": 2}[family]
    assert found["image_tokens_per_row"] == {"least": 0, "median": per_image, "most": 2 * per_image}
    if purpose == "ppo":
        prompts = [[{"role": "user", "content": "What is in the image?"}]]
        batch = encode(load_processor(family), prompts, [[]], add_generation_prompt=True)
        assert found["tokens_per_row"]["least"] == batch["input_ids"].size(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_conversations_are_as_long_as_prompt_and_reply(family, world):
    split = {"images": [str(world / "0.png")], "prompt": row([])["prompt"], "completion": row([])["chosen"]}
    whole = {"images": split["images"], "messages": [*split["prompt"], *split["completion"]]}
    lengths = {}
    for given, column in ((split, "prompt"), (whole, "messages")):
        model = ModelCheck(str(saved(family)), "sft", max_length=3)
        report = check_dataset([given], "sft", further=model)
        assert [problem.column for problem in report.problems] == [column]
        lengths[column] = model.tokens
    assert lengths["prompt"] == lengths["messages"] and len(lengths["prompt"]) == 1


def test_rows_that_are_too_long_for_the_limit_are_bad(world, capsys):
    assert check(world, "llava", "--max-length", "90") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "rows with more than 90 tokens: 1" in lines
    assert "tokens with this model, 8 of them for images, and --max-length is 90." in "".join(lines)
    assert next(line for line in lines if line.startswith("row ")).startswith("row 2, column 'prompt': it has ")
    assert lines[-1] == "3 rows with 3 images for dpo: 1 rows are bad"


def test_control_tokens_are_those_of_the_model(world, capsys):
    """The list for many families does not know them all, and knows others that mean nothing here."""
    text = [[{"role": "assistant", "content": f"A cup.{token}"}] for token in ("<|vision_end|>", "<end_of_turn>")]
    rows = "".join(json.dumps(row([], chosen=chosen)) + "\n" for chosen in text)
    (world / "control.jsonl").write_text(rows)
    assert check(world, "qwen2_5_vl", "--json", rows="control.jsonl") == 1
    found = report(capsys)
    assert [problem["row"] for problem in found["problems"]] == [0]
    assert "<|vision_end|>" in found["model"]["control_tokens"]


def test_a_row_that_the_processor_cannot_read_is_bad(world):
    """A placeholder of this model that the list for many families lacks would be an image too many."""
    model = ModelCheck(str(saved("qwen2_5_vl")), "dpo")
    bad = row([image(0)], prompt=[{"role": "user", "content": [{"type": "text", "text": "<|image_pad|>"}]}])
    (fault,) = model(bad)
    assert fault.column == "images" and "the row" in fault.reason
    assert model.refused == 1 and model.tokens_per_row is None
    assert not check_dataset([row([image(0)])], "dpo", further=lambda row: model(bad)).is_good


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-length", "9"], "--max-length needs --model"),
        (["--model", "gone", "--no-images"], "--model cannot be combined with --no-images"),
    ],
)
def test_options_that_need_each_other_say_so(more, message, world, capsys):
    assert cli.main(["check", "--input", str(world / "rows.jsonl"), "--for", "dpo", *more]) == 1
    assert message in capsys.readouterr().err


def test_a_model_without_images_is_refused(world, tmp_path, capsys):
    load_processor("llava").tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("processor_class", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    given = ["--input", str(world / "rows.jsonl"), "--for", "dpo", "--model", str(tmp_path)]
    assert cli.main(["check", *given]) == 1
    assert "which reads no images" in capsys.readouterr().err
