import pytest
import torch

from trl_vlm.testbed.evaluate import generate_captions
from trl_vlm.testbed.prior import hidden_captions, language_prior
from trl_vlm.testbed.processor import build_processor
from trl_vlm.testbed.world import World, generator


def test_shares_of_hidden_captions_by_hand():
    world = World(attributes=True)
    anchor, partner, other = world.anchors[0], world.partner_of[world.anchors[0]], world.anchors[1]
    usual = world.usual[anchor]
    another = next(color for color in ("red", "blue") if color != usual.color)
    replies = [
        f"there is a {usual.size} {usual.color} {anchor} on the left . i see a {partner} .",
        f"there is a {usual.size} {another} {anchor} on the left . there is a .",
        f"i see a {other} .",
        "",
    ]
    assert hidden_captions(replies, world) == {
        "fluent": 4 / 5,
        "usual_partners": 1 / 3,  # the first anchor has its partner in one caption of two, the other has not
        "usual_attributes": 3 / 4,
    }
    assert "usual_attributes" not in hidden_captions(replies, World())


def test_a_model_that_sees_nothing_says_the_same_of_every_picture(model, processor, world):
    images = [picture.image for picture in world.pictures(3, seed=0)]
    hidden = generate_captions(model, processor, images, max_new_tokens=8, hide_images=True)
    assert len(set(hidden)) == 1
    assert len(set(generate_captions(model, processor, images, max_new_tokens=8))) > 1


def test_perplexities_are_those_of_the_tokens_behind_the_first_sentence(model, processor, world):
    found = language_prior(model, processor, world, count=3, seed=4)
    sums = {"seen": [], "hidden": []}
    for index, (scene, image) in enumerate(world.pictures(3, seed=4)):
        caption = world.caption(scene, generator(4, index, "prior"), biased=False)
        text = f"<bos> {'<image> ' * 9}<user> describe the image {caption} <eos>"
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
        first = ids[0].tolist().index(processor.tokenizer.convert_tokens_to_ids(".")) + 1
        for name, mask in (("seen", torch.ones_like(ids)), ("hidden", (ids != processor.image_token_id).long())):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits
            losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
            sums[name] += losses[first - 1 :].tolist()
    for name, losses in sums.items():
        assert found[f"perplexity_{name}"] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


def test_a_world_with_attributes_has_their_words_behind_all_others():
    plain, full = (build_processor(attributes).tokenizer.get_vocab() for attributes in (False, True))
    assert full | plain == full  # every word keeps its id
    world = World(attributes=True)
    scene = world.picture(generator(0, 0, "iid")).scene
    caption = world.caption(scene, generator(0, 0, "x"), biased=True)
    assert set(caption.split()) <= full.keys()
    assert not set(caption.split()) <= plain.keys()
