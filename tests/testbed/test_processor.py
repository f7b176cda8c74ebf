import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from trl_vlm.data.encoding import encode
from trl_vlm.data.facts import judge_messages
from trl_vlm.testbed.datasets import assistant, user
from trl_vlm.testbed.processor import JUDGE_TEMPLATE, WORDS, encode_texts
from trl_vlm.testbed.world import NOUNS, QUESTION, REQUEST, SENTENCES

IMAGES = " ".join(["<image>"] * 9)
CAPTION = "there is a cup . i see a dog ."


@pytest.fixture(scope="module")
def images(world):
    return [picture.image for picture in world.pictures(2, seed=0)]


def words(processor, ids) -> str:
    return processor.tokenizer.decode(ids)


def rendered(processor, messages, images=(), **options) -> str:
    text = processor.apply_chat_template(
        prepare_multimodal_messages(messages, list(images)), tokenize=False, **options
    )
    batch = processor(text=[text], images=[list(images)] if images else None, return_tensors="pt")
    return words(processor, batch["input_ids"][0])


def test_a_saved_processor_is_found_by_auto_processor_and_works_alike(processor, images, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    messages = prepare_multimodal_messages([user(REQUEST), assistant(CAPTION)], images[:1])
    batches = [
        each.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        for each in (processor, loaded)
    ]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])


def test_pixels_are_neither_resized_nor_cropped(processor, images):
    found = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    expected = np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) for image in images])
    torch.testing.assert_close(found, torch.tensor((expected / 255 - 0.2) / 0.25))


def test_a_conversation_reads_as_documented(processor, images):
    turns = [user(REQUEST), assistant(CAPTION), user("is there a cup"), assistant("yes")]
    assert rendered(processor, turns, images[:1]) == (
        f"<bos> {IMAGES} <user> describe the image {CAPTION} <eos> <user> is there a cup yes <eos>"
    )


def test_rows_without_images_and_with_two_render(processor, images):
    assert rendered(processor, [user(REQUEST)]) == "<bos> <user> describe the image"
    assert rendered(processor, [user(REQUEST)], images) == f"<bos> {IMAGES} {IMAGES} <user> describe the image"


def test_the_kind_is_the_last_token_of_a_questions_prompt(processor, images):
    text = rendered(processor, [user("is there a cup")], images[:1], add_generation_prompt=True)
    assert text.endswith("<user> is there a cup")


def test_a_last_message_can_be_left_open(processor):
    text = rendered(processor, [user(REQUEST), assistant("there is")], continue_final_message=True)
    assert text == "<bos> <user> describe the image there is"


def test_an_unknown_role_is_refused(processor):
    with pytest.raises(Exception, match="not system"):
        processor.apply_chat_template([{"role": "system", "content": "be brief"}], tokenize=False)


def test_every_word_of_the_testbed_is_one_known_token_and_decodes_to_itself(processor):
    text = " ".join(WORDS)
    ids = processor.tokenizer(text)["input_ids"]
    assert len(ids) == len(WORDS)
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.decode(ids, skip_special_tokens=True) == text
    everything = [REQUEST, CAPTION, *(sentence.format("cup") for sentence in SENTENCES), QUESTION.format("dog")]
    for line in everything:
        assert processor.tokenizer.unk_token_id not in processor.tokenizer(line)["input_ids"]
    assert processor.tokenizer("A cup, unheard.")["input_ids"].count(processor.tokenizer.unk_token_id) == 2


def test_prompt_ids_begin_the_ids_of_the_whole_in_trls_rendering(processor, images):
    for count in (0, 1, 2):
        turns = [user("is there a cup"), assistant("no"), user(REQUEST)]
        prompt = prepare_multimodal_messages(turns, images[:count])
        completion = prepare_multimodal_messages([assistant(CAPTION)])
        texts = apply_chat_template({"prompt": prompt, "completion": completion}, processor)
        whole = apply_chat_template({"messages": prompt + completion}, processor)["text"]
        assert texts["prompt"] + texts["completion"] == whole
        pixels = [images[:count]] if count else None
        ids = [
            processor(text=[text], images=shown)["input_ids"][0]
            for text, shown in ((texts["prompt"], pixels), (texts["completion"], None), (whole, pixels))
        ]
        assert list(ids[0]) + list(ids[1]) == list(ids[2])


def test_trls_preference_collator_gives_prompt_and_replies(processor, images):
    row = {
        "images": images[:1],
        "prompt": [user(REQUEST)],
        "chosen": [assistant("there is a cup .")],
        "rejected": [assistant(CAPTION)],
    }
    batch = DataCollatorForVisionPreference(processor)([row])
    assert words(processor, batch["input_ids"][1]) == f"<bos> {IMAGES} <user> describe the image {CAPTION} <eos>"
    assert words(processor, batch["input_ids"][1][batch["completion_mask"][1].bool()]) == f"{CAPTION} <eos>"
    assert words(processor, batch["input_ids"][0][batch["completion_mask"][0].bool()]) == "there is a cup . <eos>"


def test_trls_supervised_collator_learns_the_reply_alone(processor, images):
    row = {"images": images[:1], "prompt": [user(REQUEST)], "completion": [assistant(CAPTION)]}
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([row])
    labels = batch["labels"][0]
    assert words(processor, labels[labels != -100]) == f"{CAPTION} <eos>"


def test_assistant_tokens_are_marked(processor, images):
    turns = [user(REQUEST), assistant(CAPTION), user("is there a cup"), assistant("yes")]
    batch = processor.apply_chat_template(
        [prepare_multimodal_messages(turns, images[:1])],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    marked = batch["input_ids"][0][torch.as_tensor(batch["assistant_masks"][0]).bool()]
    assert words(processor, marked) == f"{CAPTION} <eos> yes <eos>"


def test_texts_encoded_without_images_are_those_of_the_processors_call(processor, images):
    conversations = [[user(REQUEST), assistant(CAPTION)], [user("is there a cup"), assistant("yes")]]
    batch = encode(processor, conversations, [images[:1], images[1:]])
    texts = encode_texts(processor, conversations)
    assert torch.equal(texts.input_ids, batch["input_ids"])
    assert torch.equal(texts.real, batch["attention_mask"].bool())


def test_the_judge_template_stays_within_the_vocabulary(processor, images):
    messages = judge_messages([user(REQUEST)], [assistant(CAPTION)], list(NOUNS), JUDGE_TEMPLATE)
    batch = encode(processor, [messages], [images[:1]], continue_final_message=True)
    text = words(processor, batch["input_ids"][0])
    assert "<unk>" not in text
    assert f"<user> facts : {' '.join(NOUNS)} . {REQUEST}" in text  # where the supervised stage has put them
    assert text.endswith("<eos> <user> how accurate and helpful is the reply score")
