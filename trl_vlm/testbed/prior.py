"""How strong a model's language prior is: what it says while the whole image is hidden from it."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from trl_vlm.models.generation import evaluating
from trl_vlm.testbed.datasets import SupervisedExample
from trl_vlm.testbed.evaluate import generate_captions
from trl_vlm.testbed.oracle import find_objects
from trl_vlm.testbed.processor import IMAGE_TOKENS
from trl_vlm.testbed.sentences import statements
from trl_vlm.testbed.stream import SupervisedCollator
from trl_vlm.testbed.world import Picture, World, generator


def language_prior(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, world: World, *, count: int = 200, seed: int = 0
) -> dict[str, float]:
    """Whether a model speaks fluently, and of what usually is there, while every image token is hidden.

    Args:
        model: The model.
        processor: Its processor.
        world: Whose `iid` scenes are described.
        count: How many.
        seed: Of the scenes and samples.

    Returns:
        Shares from 0 to 1, of sampled captions, and perplexities per token:

        fluent: Sentences that can be read.
        usual_partners: Of anchors that a caption names, those whose partner it names, too.
        usual_attributes: Of the sizes and colors told, the usual ones; left out in a world without attributes.
        perplexity_hidden: Of exact captions behind their first sentence, with the image hidden.
        perplexity_seen: The same with the image.
    """
    pictures = world.pictures(count, seed)
    images = [picture.image for picture in pictures]
    limit = world.max_caption_tokens
    replies = generate_captions(
        model, processor, images, sample=True, seed=seed, max_new_tokens=limit, hide_images=True
    )
    return {
        **hidden_captions(replies, world),
        "perplexity_hidden": _perplexity(model, processor, world, pictures, seed, hidden=tuple(range(IMAGE_TOKENS))),
        "perplexity_seen": _perplexity(model, processor, world, pictures, seed, hidden=()),
    }


def hidden_captions(replies: Sequence[str], world: World) -> dict[str, float]:
    """The shares that `language_prior` gives, of captions."""
    said = [statement for reply in replies for statement in statements(reply)]
    read = [statement for statement in said if statement is not None]
    named = [set(find_objects(reply)) for reply in replies]
    accompanied = [world.partner_of[kind] in kinds for kinds in named for kind in kinds if kind in world.partner_of]
    shares = {"fluent": len(read) / max(1, len(said)), "usual_partners": _share(accompanied)}
    if world.attributes:
        told = [each for each in read if each.kind in world.usual and each.size]
        usual = [world.usual[each.kind] for each in told]
        right = [value for each, other in zip(told, usual, strict=True) for value in _agree(each[1:3], other[1:3])]
        shares["usual_attributes"] = _share(right)
    return shares


def _agree(values: Sequence[str], others: Sequence[str]) -> list[bool]:
    return [value == other for value, other in zip(values, others, strict=True)]


def _share(found: Sequence[bool]) -> float:
    return sum(found) / max(1, len(found))


def _perplexity(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    world: World,
    pictures: Sequence[Picture],
    seed: int,
    hidden: tuple[int, ...],
) -> float:
    """Of exact captions behind their first sentence, end token included."""
    examples = []
    for index, picture in enumerate(pictures):
        rng = generator(seed, index, "prior")
        caption = world.caption(picture.scene, rng, biased=False)
        question = world.question(picture.scene, rng, biased=False)
        examples.append(SupervisedExample(picture, [], caption, [question], hidden))
    batch: dict[str, Any] = SupervisedCollator(processor)(examples)
    labels = batch["captions"].pop("labels")
    ends = (labels == processor.tokenizer.convert_tokens_to_ids(".")).long()
    is_behind = ends.cumsum(1) - ends > 0  # at least one full stop is before the token
    inputs = {**batch["captions"], "pixel_values": batch["pixel_values"]}
    with evaluating(model):
        logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits[:, :-1]
    wanted = labels.masked_fill(~is_behind, -100)[:, 1:].to(model.device)
    return float(F.cross_entropy(logits.float().transpose(1, 2), wanted).exp())
