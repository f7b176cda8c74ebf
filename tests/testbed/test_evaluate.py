import pytest
import torch

from trl_vlm.evaluation.chair import ChairScores
from trl_vlm.evaluation.pope import PopeScores
from trl_vlm.testbed.datasets import user
from trl_vlm.testbed.evaluate import answer_questions, caption_sampler, draw_poll, evaluate, generate_captions
from trl_vlm.testbed.world import REQUEST, World


@pytest.fixture(scope="module")
def pictures(world):
    return world.pictures(6, seed=0, split="adv")


@pytest.fixture(scope="module")
def images(pictures):
    return [picture.image for picture in pictures]


def processed(processor, text, image):
    messages = [user([{"type": "image", "image": image}, {"type": "text", "text": text}])]
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def test_greedy_captions_are_those_of_one_picture_at_a_time(model, processor, images):
    replies = generate_captions(model, processor, images, max_new_tokens=12, batch=4)
    for image, reply in zip(images, replies, strict=True):
        batch = processed(processor, REQUEST, image)
        output = model.generate(**batch, do_sample=False, max_new_tokens=12)[0, batch["input_ids"].shape[1] :]
        assert processor.decode(output, skip_special_tokens=True) == reply


def test_samples_follow_their_seed_and_leave_everything_else_alone(model, processor, images):
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sample = caption_sampler(model, processor)
    assert sample(images[:2], 1) == sample(images[:2], 1) != sample(images[:2], 2)
    assert torch.equal(torch.rand(1), expected)
    assert model.training


def test_answers_are_read_off_the_logits_of_the_processors_own_prompt(model, processor, images):
    questions = ["is there a cup", "is there a dog"] * 3
    shown = [images[0], *images[:5]]  # one picture twice
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    logits = [model(**processed(processor, q, image)).logits[0, -1] for q, image in zip(questions, shown, strict=True)]
    expected = ["yes" if row[yes] > row[no] else "no" for row in logits]
    assert answer_questions(model, processor, shown, questions, batch=4) == expected


def test_questions_of_unequal_length_are_refused(model, processor, images):
    with pytest.raises(ValueError, match="one length"):
        answer_questions(model, processor, images[:2], ["is there a cup", "is there"])


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_poll_asks_three_and_three_and_its_answers_are_true(world, pictures, adversarial):
    poll = draw_poll(world, pictures, seed=0, adversarial=adversarial)
    asked = [
        index for index, picture in enumerate(pictures) if world.missing_partners(picture.scene) or not adversarial
    ]
    assert poll.pictures == [index for index in asked for _ in range(6)]
    assert poll.answers == ["yes", "no"] * 3 * len(asked)
    for index, question, answer in zip(*poll, strict=True):
        scene = pictures[index].scene
        kind = question.split()[-1]
        assert (kind in scene.kinds) == (answer == "yes")
        if adversarial and answer == "no":
            assert kind in world.missing_partners(scene)


def test_an_evaluation_names_all_scores_of_all_splits_and_repeats_itself(model, processor, world):
    results = evaluate(model, processor, world, splits=["balanced", "adv"], scenes=6, seed=1)
    names = {f"{kind}/{field}" for kind in ("greedy", "sampled") for field in ChairScores._fields}
    names |= {f"pope_{kind}/{field}" for kind in ("random", "adversarial") for field in PopeScores._fields}
    assert results.keys() == {f"{split}/{name}" for split in ("balanced", "adv") for name in names}
    assert results["adv/pope_random/questions"] == 36
    assert evaluate(model, processor, world, splits=["adv"], scenes=6, seed=1).items() <= results.items()


def test_without_adversarial_questions_their_scores_are_left_out(model, processor):
    results = evaluate(model, processor, World(partner_probability=1.0), splits=["iid"], scenes=2)
    assert "iid/pope_random/accuracy" in results
    assert not any("adversarial" in name for name in results)
