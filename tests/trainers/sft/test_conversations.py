"""A loss over the replies of whole conversations, for every family and chat template."""

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForImageTextToText

from tests.families import FAMILIES, TEMPLATES, image, load_processor, saved
from tests.trainers.sft.test_replies import make
from trl_vlm import SFTConfig, SFTTrainer
from trl_vlm.data.errors import RowError
from trl_vlm.models.reply_ends import with_reply_ends
from trl_vlm.models.reply_marks import marks_replies, with_reply_marks

QUESTIONS = ("What is in the image?", "A cat. Or a dog?", "And what else?")
REPLIES = ("A cat.", "A dog, there is.", "A red square on a white wall.")
# TRL has its own version of these templates.
KNOWN = {"llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "gemma3"}


def conversation(turns, parts=False):
    said = [text for pair in zip(QUESTIONS[:turns], REPLIES[:turns], strict=True) for text in pair]
    return [
        {"role": ("user", "assistant")[place % 2], "content": [{"type": "text", "text": text}] if parts else text}
        for place, text in enumerate(said)
    ]


def rows(turns, images=(1, 0, 2)):
    return Dataset.from_list(
        [
            {"images": [image(10 * row + place) for place in range(count)], "messages": conversation(turns)}
            for row, count in enumerate(images)
        ]
    )


def pairs(turns):
    """The same with the last reply as completion."""
    return rows(turns).map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns="messages"
    )


def trained_texts(trainer):
    """Of each row the texts of its runs of trained tokens."""
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(len(trainer.train_dataset))])
    texts = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        runs, before = [], False
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            if label != -100 and not before:
                runs.append([])
            if label != -100:
                runs[-1].append(token)
            before = label != -100
        texts.append([trainer._tokenizer.decode(run).strip() for run in runs])
    return texts


def unknown(family):
    """A processor with a template that TRL has never seen, which renders the same."""
    processor = load_processor(family)
    processor.chat_template = "{#- mine -#}" + processor.chat_template
    return processor


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_labels_are_exactly_the_replies_with_their_ends(family, turns, tmp_path):
    processors = [load_processor(family)] + [unknown(family)] * (family in KNOWN)
    wanted = [[reply + TEMPLATES[family].end for reply in REPLIES[:turns]]] * 3
    for processor in processors:
        trainer = make(tmp_path, family, rows(turns), assistant_only_loss=True, processor=processor)
        assert trained_texts(trainer) == wanted
    assert trained_texts(make(tmp_path, family, pairs(turns))) == [reply[-1:] for reply in wanted]


@pytest.mark.parametrize("family", [name for name in TEMPLATES if name in FAMILIES])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_marked_template_renders_the_same_text(family, turns):
    processor = with_reply_ends(load_processor(family))
    marked = with_reply_marks(processor)
    for asks in (False, True):
        messages = conversation(turns, parts=True)[: -1 if asks else None]
        messages[0]["content"] = [{"type": "image"}, *messages[0]["content"]]
        wanted = processor.apply_chat_template(messages, add_generation_prompt=asks)
        found = marked.apply_chat_template(messages, add_generation_prompt=asks)
        # PaliGemma's processor would add it behind the image.
        bos = processor.tokenizer.bos_token if family == "paligemma" else ""
        assert found == wanted.replace("<image>", "<image>" + bos)
    assert marks_replies(marked) and processor.chat_template != marked.chat_template


def test_the_saved_processor_keeps_its_own_template(tmp_path):
    processor = load_processor("internvl")
    before = processor.chat_template
    trainer = make(tmp_path, "internvl", rows(3), assistant_only_loss=True, processor=processor)
    trainer.save_model()
    assert processor.chat_template == before == load_processor(tmp_path).chat_template
    assert trained_texts(trainer)  # and batches are still made with the other


def test_a_known_template_is_left_to_trl(tmp_path):
    found, wanted = (
        make(tmp_path, "qwen2_5_vl", rows(3), trainer=trainer, config=config, assistant_only_loss=True, max_steps=3)
        for trainer, config in ((SFTTrainer, SFTConfig), (trl.SFTTrainer, trl.SFTConfig))
    )
    losses = []
    for trainer in (found, wanted):
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_set_the_losses_are_trls(family, tmp_path):
    processor = with_reply_ends(load_processor(family))  # of what it does `test_replies` speaks
    made = (
        make(tmp_path, family, pairs(2), trainer=trainer, config=config, processor=processor, max_steps=2)
        for trainer, config in ((SFTTrainer, SFTConfig), (trl.SFTTrainer, trl.SFTConfig))
    )
    losses = []
    for trainer in made:
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_text_rows_have_reply_labels_too(tmp_path):
    trainer = make(tmp_path, "llava", rows(3).remove_columns("images"), assistant_only_loss=True)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    kept = batch["input_ids"][0][batch["labels"][0] != -100]
    assert trainer._tokenizer.decode(kept).replace("</s> ", "</s>").strip() == "".join(
        f"{space}{reply}</s>" for space, reply in zip(("", " ", " "), REPLIES, strict=True)
    ).replace("</s> ", "</s>")


def test_no_token_of_paligemmas_replies_sees_a_later_one(tmp_path):
    """A conversation that is encoded as a whole counts as a prompt, which it reads in both directions."""
    trainer = make(tmp_path, "paligemma", rows(3, (1,)), assistant_only_loss=True)
    model = AutoModelForImageTextToText.from_pretrained(saved("paligemma", sharp=4.0)).eval()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    is_label = batch.pop("labels")[0] != -100
    first, last = is_label.nonzero().flatten()[[0, -1]].tolist()
    other = dict(batch)
    other["input_ids"] = batch["input_ids"].clone()
    other["input_ids"][0, last] = (batch["input_ids"][0, last] + 1) % 200 + 20
    with torch.no_grad():
        one, two = (model(**inputs).logits[0] for inputs in (batch, other))
    assert torch.allclose(one[first:last], two[first:last], atol=1e-5)
    assert not torch.allclose(one[last], two[last], atol=1e-3)


def test_a_row_whose_replies_are_all_cut_is_named(tmp_path):
    data = rows(1, (0, 0))
    long = data.map(
        lambda row, place: {
            "messages": [{"role": "user", "content": "What? " * (1 + 60 * place)}, row["messages"][1]]
        },
        with_indices=True,
    )
    trainer = make(tmp_path, "internvl", long, assistant_only_loss=True, max_length=60)
    with pytest.raises(RowError, match=r"train row 1: `max_length=60` cuts off its whole reply"):
        trainer.data_collator([trainer.train_dataset[place] for place in range(2)])


def test_a_template_that_forgets_earlier_replies_is_refused(tmp_path):
    processor = load_processor("internvl")
    processor.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' or loop.last %}<|im_start|>"
        "{{ message['content'] if message['content'] is string else message['content'][-1]['text'] }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="cannot be told from the rest: it renders them in one way while they are"):
        make(tmp_path, "internvl", rows(3), assistant_only_loss=True, processor=processor)


def test_a_tokenizer_without_a_template_is_refused():
    processor = load_processor("internvl")
    processor.chat_template = None
    with pytest.raises(ValueError, match="is missing, so replies cannot be told from questions"):
        with_reply_marks(processor)
