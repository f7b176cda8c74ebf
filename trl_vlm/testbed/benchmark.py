"""The testbed's measures as benchmarks: captions, greedy and sampled, and yes / no questions.

    trl-vlm evaluate MODEL --output results/ --tasks trl_vlm.testbed.benchmark:CAPTIONS

The scenes are drawn when they are needed: those of a `scenes.json` in the folder `--data`, or else the default ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from trl_vlm.data.io.atomic import write_whole
from trl_vlm.evaluation.benchmark import Benchmark, Question, Ratio, Record, Scores
from trl_vlm.evaluation.benchmarks.pope import only
from trl_vlm.evaluation.benchmarks.rows import caption_metrics, caption_ratios, question_metrics, question_ratios
from trl_vlm.evaluation.objects.finder import Mention
from trl_vlm.testbed.oracle import find_objects
from trl_vlm.testbed.world import QUESTION, REQUEST, Picture, Split, World, generator

STYLES = ("random", "adversarial")
QUESTIONS_PER_ANSWER = 3  # yes and no questions per scene, each
SCENES_FILE = "scenes.json"


@dataclass(frozen=True)
class Scenes:
    """Which scenes are drawn.

    Args:
        world: The world that they are drawn from.
        count: Scenes per split.
        seed: Seed of scenes, questions and sampled captions. Choose other seeds for tuning than for reporting.
        splits: Which splits are drawn.
    """

    world: World = field(default_factory=World)
    count: int = 300
    seed: int = 9001
    splits: Sequence[Split] = ("iid", "adv")

    def save(self, folder: Path) -> None:
        """Writes `scenes.json` and `world.json` into a folder, which is then a benchmark's data."""
        folder.mkdir(parents=True, exist_ok=True)
        self.world.save(folder)
        values = {"count": self.count, "seed": self.seed, "splits": list(self.splits)}
        write_whole(folder / SCENES_FILE, json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Scenes":
        """Reads what `save` wrote; the default scenes if there is nothing."""
        if not (folder / SCENES_FILE).is_file():
            return cls()
        return cls(World.load(folder), **json.loads((folder / SCENES_FILE).read_text(encoding="utf-8")))

    def pictures(self, split: Split) -> list[Picture]:
        """The pictures of a split."""
        return list(_pictures(self.world, self.count, self.seed, split))


@lru_cache(maxsize=4)
def _pictures(world: World, count: int, seed: int, split: Split) -> list[Picture]:
    """Drawn once: three benchmarks ask about the same pictures, and each of several comparisons reads all three."""
    return world.pictures(count, seed, split)


class Poll(NamedTuple):
    """Questions: the i-th is about picture `pictures[i]`, and `answers[i]`, "yes" or "no", is true."""

    pictures: list[int]
    questions: list[str]
    answers: list[str]


def draw_poll(world: World, pictures: Sequence[Picture], seed: int, *, adversarial: bool) -> Poll:
    """POPE's questions: three with the answer yes and three with no for each picture.

    Random negatives ask for any absent kind. Adversarial ones ask for the absent partner of a present anchor, and
    pictures without one are left out.
    """
    poll = Poll([], [], [])
    for index, (scene, _) in enumerate(pictures):
        if adversarial and not world.missing_partners(scene):
            continue
        rng = generator(seed, index, "poll")
        for _ in range(QUESTIONS_PER_ANSWER):
            present = scene.kinds[int(rng.integers(len(scene.kinds)))]
            absent = world.absent_kind(scene, rng, adversarial=adversarial)
            for kind, answer in ((present, "yes"), (absent, "no")):
                poll.pictures.append(index)
                poll.questions.append(QUESTION.format(kind))
                poll.answers.append(answer)
    return poll


def captions_of(scenes: Scenes, *, sampled: bool = False) -> list[Question]:
    """One request for a caption per scene; a sampled caption has the seed of its scene."""
    found = []
    for split in scenes.splits:
        for number, (scene, image) in enumerate(scenes.pictures(split)):
            seed = int(generator(scenes.seed, number, f"{split} caption").integers(2**62)) if sampled else None
            truth = {"split": split, "objects": scene.kinds}
            found.append(Question(f"{split}-{number}", REQUEST, truth, (image,), f"{split}-{number}", seed=seed))
    return found


def questions_of(scenes: Scenes) -> list[Question]:
    """The yes / no questions of both styles; there may be scenes that allow no adversarial one."""
    found = []
    for split in scenes.splits:
        pictures = scenes.pictures(split)
        for style in STYLES:
            poll = draw_poll(scenes.world, pictures, scenes.seed, adversarial=style == "adversarial")
            for number, (place, text, answer) in enumerate(zip(*poll, strict=True)):
                truth = {"split": split, "category": style, "answer": answer}
                name, images = f"{split}-{style}-{number}", (pictures[place].image,)
                found.append(Question(name, text, truth, images, f"{split}-{place}"))
    return found


def score_captions(records: Sequence[Record]) -> Scores:
    """CHAIR, recall, repeats and length for each split."""
    found = [[Mention(name, name) for name in find_objects(record.reply)] for record in records]
    ratios = caption_ratios(found, [record.truth["objects"] for record in records], records)
    by_split: dict[str, Ratio] = {}
    for split in dict.fromkeys(record.truth["split"] for record in records):
        chosen = [record.truth["split"] == split for record in records]
        by_split |= {f"{split}_{name}": only(ratio, chosen) for name, ratio in ratios.items()}
    return Scores(by_split)


def score_questions(records: Sequence[Record]) -> Scores:
    """POPE's numbers of random and adversarial questions for each split.

    A question counts as answered if the reply says yes or no; `trl_vlm.data.answers.yes_or_no` reads it.
    """
    ratios: dict[str, Ratio] = {}
    for split in dict.fromkeys(record.truth["split"] for record in records):
        categories = [record.truth["category"] if record.truth["split"] == split else "" for record in records]
        ratios |= {f"{split}_{name}": ratio for name, ratio in question_ratios(records, categories).items()}
    return Scores(ratios)


def scenes_benchmarks(scenes: Scenes | None = None) -> tuple[Benchmark, Benchmark, Benchmark]:
    """Greedy captions, sampled captions, and questions.

    Args:
        scenes: What they are about; None: what the data folder says.
    """
    splits = (scenes or Scenes()).splits
    of_captions = [line for split in splits for line in caption_metrics(f"{split}_", split)]
    of_questions = [
        line for split in splits for style in STYLES for line in question_metrics(style, f"{split}_", split)
    ]

    def about(data: Path) -> Scenes:
        return Scenes.load(data) if scenes is None else scenes

    captions = Benchmark(
        name="testbed-captions",
        title="captions of a small world in which the truth is known",
        source="drawn when needed",
        license="that of this package",
        size=f"{(scenes or Scenes()).count} scenes of each of {len(splits)} splits",
        files="nothing, or scenes.json and world.json as `Scenes.save` writes them",
        read=lambda data: captions_of(about(data)),
        score=score_captions,
        metrics=tuple(of_captions),
        max_new_tokens=(scenes or Scenes()).world.max_caption_tokens,
    )
    sampled = replace(
        captions,
        name="testbed-sampled",
        title="sampled captions of a small world",
        read=lambda data: captions_of(about(data), sampled=True),
    )
    questions = replace(
        captions,
        name="testbed-questions",
        title="yes / no questions about a small world",
        read=lambda data: questions_of(about(data)),
        score=score_questions,
        metrics=tuple(of_questions),
    )
    return captions, sampled, questions


CAPTIONS, SAMPLED, QUESTIONS = TESTBED = scenes_benchmarks()
