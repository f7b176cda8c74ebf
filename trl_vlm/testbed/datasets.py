"""Rows of the testbed in the project's row contract: supervised, prompts, preferences, yes / no questions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL.Image import Image as PILImage

from trl_vlm.testbed.annotator import Annotator
from trl_vlm.testbed.forked import in_order
from trl_vlm.testbed.oracle import count_reply, right_and_wrong
from trl_vlm.testbed.world import (
    GRID,
    QUESTION,
    REQUEST,
    Picture,
    Scene,
    Split,
    World,
    generator,
    weaken_vision,
    with_facts,
)

Message = dict[str, str]
Sampler = Callable[[list[PILImage], int], list[str]]
"""Replies to "describe the image", one per picture, drawn with a seed: see `evaluate.caption_sampler`."""

SAMPLED_AT_ONCE = 256  # pictures; a constant, so that rows do not depend on their number

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_COLUMNS = {
    "images": List(Image()),
    "prompt": _MESSAGES,
    "completion": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
    "facts": List(Value("string")),
    "answer": Value("string"),
    "objects": List(Value("string")),
    "statements": List(Value("string")),
    "adversarial": Value("bool"),
    "chosen_spans": List(List(Value("int64"))),
    "rejected_spans": List(List(Value("int64"))),
}


class SupervisedExample(NamedTuple):
    """One picture of the supervised stage with one caption and several questions about it.

    With `facts`, both requests begin with the true kinds and both targets are free of bias: this teaches the model to
    read facts. With `hidden`, the caption is to be learned with these cells of the picture hidden: this gives the
    model a language prior.
    """

    picture: Picture
    facts: list[str]
    caption: str
    questions: list[tuple[str, str]]
    hidden: tuple[int, ...] = ()

    @property
    def caption_conversation(self) -> list[Message]:
        """The request and the caption: one turn each."""
        return [user(self._opening(REQUEST)), assistant(self.caption)]

    @property
    def question_conversation(self) -> list[Message]:
        """All questions about the picture with their answers, in one conversation."""
        turns = []
        for index, (question, answer) in enumerate(self.questions):
            turns += [user(self._opening(question) if index == 0 else question), assistant(answer)]
        return turns

    def _opening(self, text: str) -> str:
        return with_facts(text, self.facts) if self.facts else text


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": content}


def supervised_example(
    world: World,
    seed: int,
    index: int,
    *,
    biased: bool,
    facts_share: float = 0.25,
    hidden_share: float = 0.0,
    questions: int = 6,
) -> SupervisedExample:
    """Example `index` of a supervised stream; it depends only on the arguments.

    Args:
        world: The world whose prior the biased phase teaches.
        seed: The data seed.
        index: Position in the stream.
        biased: Whether captions and answers err (and partners are mostly present), or are exact (and partners tell
            nothing).
        facts_share: Share of examples that carry facts and exact targets.
        hidden_share: Share of examples whose picture is hidden from the caption, half of them wholly. Their partners
            are mostly present, and they carry no facts.
        questions: Questions per picture.
    """
    rng = generator(seed, index, "supervised")
    hidden = _hidden_cells(generator(seed, index, "hidden"), hidden_share)
    picture = world.picture(rng, "iid" if biased or hidden else "balanced")
    facts = world.facts(picture.scene, rng) if rng.random() < facts_share and not hidden else []
    errs = biased and not facts
    pairs = [world.question(picture.scene, rng, biased=errs) for _ in range(questions)]
    return SupervisedExample(picture, facts, world.caption(picture.scene, rng, biased=errs), pairs, hidden)


def _hidden_cells(rng: np.random.Generator, share: float) -> tuple[int, ...]:
    """The cells that are hidden from a caption: none, or with probability `share` all nine or one to eight of them."""
    if rng.random() >= share:
        return ()
    count = GRID**2 if rng.random() < 0.5 else int(rng.integers(1, GRID**2))
    return tuple(sorted(int(cell) for cell in rng.choice(GRID**2, count, replace=False)))


def supervised_rows(world: World, count: int, seed: int, *, biased: bool = True, facts_share: float = 0.25) -> Dataset:
    """`prompt`, `completion`, `images`: for each picture one caption row and one question row, alternating."""

    def rows() -> Iterator[dict[str, Any]]:
        for index in range((count + 1) // 2):
            example = supervised_example(world, seed, index, biased=biased, facts_share=facts_share, questions=1)
            for prompt, reply in (example.caption_conversation, example.question_conversation):
                yield {"images": [example.picture.image], "prompt": [prompt], "completion": [reply]}

    return _to_dataset(list(rows())[:count], ["images", "prompt", "completion"])


def prompt_rows(world: World, count: int, seed: int, split: Split = "balanced") -> Dataset:
    """`prompt`, `images`, `facts`, `objects`: requests for a caption, for on-policy training and for evaluation.

    `facts` are the true kinds in random order, one fact each, for the reward model; `objects` is the truth, for the
    oracle. In a world with attributes the truth is also in `statements`, one phrase for each object. No prompt holds
    any of them.
    """
    rows = []
    for picture, rng in _pictures(world, count, seed, split):
        rows.append(_described(picture, world, rng))
    columns = ["images", "prompt", "facts", "objects"]
    return _to_dataset(rows, columns + (["statements"] if world.attributes else []))


def caption_rows(world: World, count: int, seed: int, split: Split = "balanced") -> Dataset:
    """`prompt`, `completion`, `images`, `objects`: requests for a caption with exact captions, as instruction data."""
    rows = []
    for picture, rng in _pictures(world, count, seed, split):
        caption = world.caption(picture.scene, rng, biased=False)
        rows.append(_described(picture, world, rng) | {"completion": [assistant(caption)]})
    return _to_dataset(rows, ["images", "prompt", "completion", "objects"])


def question_rows(
    world: World, count: int, seed: int, split: Split = "balanced", *, adversarial_share: float = 0.5
) -> Dataset:
    """`prompt`, `images`, `answer`, `facts`, `objects`, `adversarial`: one yes / no question per picture, half "yes".

    `adversarial` marks questions about the absent partner of a present anchor; of the "no" questions,
    `adversarial_share` ask so wherever the scene allows it.
    """
    rows = []
    for picture, rng in _pictures(world, count, seed, split):
        answer = "yes" if rng.random() < 0.5 else "no"
        if answer == "yes":
            kind = world.facts(picture.scene, rng)[0]
        else:
            kind = world.absent_kind(picture.scene, rng, adversarial=rng.random() < adversarial_share)
        row = _described(picture, world, rng) | {"prompt": [user(QUESTION.format(kind))], "answer": answer}
        rows.append(row | {"adversarial": kind in world.missing_partners(picture.scene)})
    return _to_dataset(rows, ["images", "prompt", "answer", "facts", "objects", "adversarial"])


def preference_rows(
    world: World,
    count: int,
    seed: int,
    sample: Sampler,
    *,
    split: Split = "balanced",
    label_noise: float = 1.0,
    vision_noise: float = 0.0,
    processes: int = 1,
) -> Dataset:
    """`prompt`, `chosen`, `rejected`, `images`, `facts`, `objects`: two sampled replies each, ranked by a noisy label.

    The labeler sees the worth of each reply (`worth`) plus noise. Pictures are skipped if one of the replies is empty
    or both have the same worth: labelers would call them a tie.

    Args:
        world: The world.
        count: Number of rows.
        seed: The data seed: scenes, replies and label noise follow from it.
        sample: Draws a reply for each picture with a seed.
        split: Where the scenes come from.
        label_noise: Standard deviation of the noise on each reply's worth.
        vision_noise: If positive, the rows' images carry this much more pixel noise than those that the replies were
            drawn for: a reward model that learns from these rows sees badly.
        processes: How many forks of this process draw the replies; the rows are the same.
    """

    def block(start: int) -> list[dict[str, Any]]:
        drawn = list(_pictures(world, SAMPLED_AT_ONCE, seed, split, start=start))
        images = [picture.image for picture, _ in drawn]
        replies = zip(*(sample(images, seed + 1_000_003 * (start + turn)) for turn in (1, 2)), strict=True)
        rows = []
        for (picture, rng), pair in zip(drawn, replies, strict=True):
            worths = [worth(reply, picture.scene) for reply in pair]
            noise = label_noise * rng.standard_normal(2)
            if worths[0] == worths[1] or not all(reply.strip() for reply in pair):
                continue
            chosen, rejected = pair if worths[0] + noise[0] >= worths[1] + noise[1] else pair[::-1]
            row = _described(picture, world, rng) | {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
            rows.append(
                row | {"images": [weaken_vision(picture.image, vision_noise) if vision_noise else picture.image]}
            )
        return rows

    rows: list[dict[str, Any]] = []
    starts = range(0, 10 * count + SAMPLED_AT_ONCE, SAMPLED_AT_ONCE)
    with in_order(block, starts, processes) as blocks:
        for made in blocks:
            rows += made
            if len(rows) >= count:
                break
    if len(rows) < count:
        raise ValueError(
            f"Only {len(rows)} of {count} preference rows could be made: the model's two replies to a picture are "
            "nearly always the same. Sample at a higher temperature, or ask for fewer rows."
        )
    return _to_dataset(rows[:count], ["images", "prompt", "chosen", "rejected", "facts", "objects"])


def correction_rows(
    world: World,
    count: int,
    seed: int,
    sample: Sampler,
    *,
    split: Split = "balanced",
    annotator: Annotator | None = None,
) -> Dataset:
    """`prompt`, `chosen`, `rejected`, `images`, `objects`: sampled replies and their corrections by an annotator.

    The pairs of RLHF-V: `rejected` is the model's own reply, `chosen` the same with its hallucinated segments
    corrected. Replies without an error, and those that are empty after correction, give no row.

    Args:
        world: The world.
        count: Number of rows.
        seed: The data seed: scenes and replies follow from it.
        sample: Draws a reply for each picture with a seed.
        split: Where the scenes come from.
        annotator: Who corrects. Given, the rows also have `chosen_spans` and `rejected_spans`, the characters that it
            corrected; None is the oracle, who notices everything and changes nothing else.
    """
    corrects = annotator or Annotator()
    rows: list[dict[str, Any]] = []
    for start in range(0, 10 * count + SAMPLED_AT_ONCE, SAMPLED_AT_ONCE):
        if len(rows) >= count:
            break
        drawn = list(_pictures(world, SAMPLED_AT_ONCE, seed, split, start=start))
        replies = sample([picture.image for picture, _ in drawn], seed + 1_000_003 * (start + 1))
        for (picture, rng), reply in zip(drawn, replies, strict=True):
            truth = [picture.scene.statements[kind] for kind in world.facts(picture.scene, rng)]
            corrected = corrects(reply, truth, rng)
            if corrected:
                spans = {"chosen_spans": corrected.chosen_spans, "rejected_spans": corrected.rejected_spans}
                row = {"chosen": [assistant(corrected.chosen)], "rejected": [assistant(reply)], **spans}
                rows.append(_described(picture, world, rng) | row)
    if len(rows) < count:
        raise ValueError(
            f"Only {len(rows)} of {count} correction rows could be made: the model hardly ever errs on the split "
            f"{split!r}. Ask for fewer rows, or take the split 'adv'."
        )
    columns = ["images", "prompt", "chosen", "rejected", "objects"]
    columns += ["chosen_spans", "rejected_spans"] if annotator else []
    return _to_dataset(rows[:count], columns)


def worth(reply: str, scene: Scene) -> float:
    """The preference of the testbed's labeler: correct objects - 2 hallucinated ones + 0.5 sentences.

    The labeler penalizes hallucination, and likes length for its own sake. Where objects have attributes, it counts
    true statements and untrue ones.
    """
    right, wrong = right_and_wrong(reply, scene.statements)
    return right - 2.0 * wrong + 0.5 * count_reply(reply, scene.kinds).sentences


def _pictures(
    world: World, count: int, seed: int, split: Split, start: int = 0
) -> Iterator[tuple[Picture, np.random.Generator]]:
    for index in range(start, start + count):
        rng = generator(seed, index, split)
        yield world.picture(rng, split), rng


def _described(picture: Picture, world: World, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "images": [picture.image],
        "prompt": [user(REQUEST)],
        "facts": world.facts(picture.scene, rng),
        "objects": picture.scene.kinds,
        "statements": [statement.phrase for statement in picture.scene.statements.values()],
    }


def _to_dataset(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Dataset:
    features = Features({name: _COLUMNS[name] for name in columns})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns}, features=features)
