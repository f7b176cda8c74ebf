"""What the supervised stage trains of a reply: all of it, its end once, and never nothing."""

import pytest
import trl

from tests.families import TEMPLATES, load_processor, saved
from tests.preference_rows import preference_rows
from trl_vlm import SFTConfig, SFTTrainer
from trl_vlm.data.errors import RowError
from trl_vlm.models.reply_ends import leaves_replies_open

FAMILIES = ("llava", "qwen2_5_vl")
TURNS = ("What is in the image?", "A cat.", "And what else?", "A dog.")


def pairs():
    data = preference_rows([1, 0, 2]).remove_columns(["facts", "margin", "rejected"])
    return data.rename_column("chosen", "completion")


def conversation(turns=TURNS):
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


def single_turn():
    return pairs()


def later_turn():
    """The prompt holds a reply of its own, which is not trained on."""
    return pairs().remove_columns("prompt").add_column("prompt", [conversation(TURNS[:3])] * 3)


def messages():
    """Whole conversations of two replies; all of them is trained on."""
    return pairs().select_columns("images").add_column("messages", [conversation()] * 3)


def make(folder, family="llava", data=None, trainer=SFTTrainer, config=SFTConfig, processor=None, **options):
    settings = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_length": None}
    return trainer(
        str(saved(family, sharp=4.0)),
        args=config(str(folder), **settings | options),
        train_dataset=single_turn() if data is None else data,
        processing_class=processor or load_processor(family),
    )


def trained_tokens(trainer):
    """The supervised tokens of each row."""
    labels = trainer.data_collator([trainer.train_dataset[place] for place in range(3)])["labels"]
    return [row[row != -100].tolist() for row in labels]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("data", [single_turn, later_turn])
def test_the_last_supervised_token_of_a_completion_is_its_end_once(data, family, tmp_path):
    trainer = make(tmp_path, family, data())
    end = trainer._tokenizer.convert_tokens_to_ids(TEMPLATES[family].end)
    for tokens in trained_tokens(trainer):
        assert tokens.count(end) == 1
        assert trainer._tokenizer.decode(tokens[tokens.index(end) :]).rstrip("\n") == TEMPLATES[family].end


@pytest.mark.parametrize("family", FAMILIES)
def test_every_reply_of_a_conversation_ends_once(family, tmp_path):
    trainer = make(tmp_path, family, messages())
    text, end = trainer._tokenizer.decode(trained_tokens(trainer)[0]), TEMPLATES[family].end
    for reply in (TURNS[1], TURNS[3]):
        assert text.count(reply + end) == 1
    replies, turns = 2, len(TURNS) + ("You are a helpful assistant" in text)
    assert text.count(end) == (replies if family == "llava" else turns)
    assert text.rstrip("\n").endswith(end)


def test_the_end_of_text_rows_is_trained_and_the_saved_processor_says_so(tmp_path):
    trainer = make(tmp_path, data=later_turn().remove_columns("images"))
    assert all(row["labels"][-1] == trainer._tokenizer.eos_token_id for row in trainer.train_dataset)
    trainer.save_model()
    assert not leaves_replies_open(load_processor(tmp_path))


def test_a_template_that_the_options_bring_is_closed_too(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATES["llava"].template)
    trainer = make(tmp_path, "qwen2_5_vl", chat_template_path=str(path))
    assert not leaves_replies_open(trainer.processing_class)
    assert trainer.args.chat_template_path == str(path)
    assert leaves_replies_open(make(tmp_path, chat_template_path=str(path), append_eos=False).processing_class)


@pytest.mark.parametrize(("family", "options"), [("qwen2_5_vl", {}), ("llava", {"append_eos": False})])
def test_where_nothing_of_ours_is_needed_the_losses_are_trls(family, options, tmp_path):
    found, wanted = (
        make(tmp_path, family, trainer=trainer, config=config, max_steps=3, **given)
        for trainer, config, given in ((SFTTrainer, SFTConfig, options), (trl.SFTTrainer, trl.SFTConfig, {}))
    )
    losses = []
    for trainer in (found, wanted):
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_a_row_whose_reply_is_cut_off_is_named_and_not_trained_on_in_silence(tmp_path):
    """TRL trains on it, with a loss of 0.0."""
    data = pairs().select([0, 1])
    long = [{"role": "user", "content": "What is in the image? " * 30}]
    data = data.remove_columns("prompt").add_column("prompt", [data[0]["prompt"], long])
    trainer = make(tmp_path, data=data, max_length=60)
    message = r"train row 1: `max_length=60` cuts off its whole reply.*raise `max_length` or set it to None"
    with pytest.raises(RowError, match=message):
        trainer.train()


def test_text_rows_whose_reply_is_cut_off_are_counted(tmp_path, caplog):
    data = later_turn().remove_columns("images")
    long = conversation([*TURNS[:2], "And what else? " * 60])
    data = data.remove_columns("prompt").add_column("prompt", [*data["prompt"][:2], long])
    assert len(make(tmp_path, data=data, max_length=100).train_dataset) == 2
    assert "`max_length=100` cuts off the whole reply of 1 of the 3 rows of the train dataset" in caplog.text
    with pytest.raises(ValueError, match=r"of 3 of the 3 rows of the train dataset: none is left. Raise it"):
        make(tmp_path, data=data, max_length=4)


def test_a_broken_image_is_named(tmp_path):
    trainer = make(tmp_path)
    row = dict(trainer.train_dataset[2])
    row["images"] = [row["images"][0], {"bytes": b"no image", "path": None}]
    with pytest.raises(RowError, match="train row 2, image 1"):
        trainer.data_collator([row])
