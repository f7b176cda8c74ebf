"""A small world in which hallucination can be measured: scenes, their pictures, and texts about them.

Every kind of object has a color and a shape of its own. Some kinds are *anchors*: their *partner* is nearly always
beside them, as a chair is beside a table. A model trained on captions that assume the partner learns to name what it
does not see. In a world with attributes a kind has a shape of its own, and a color and a size that it usually has.
"""

import colorsys
import dataclasses
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from trl_vlm.testbed.glyphs import distinct_bitmaps
from trl_vlm.testbed.sentences import COLORS, NOUNS, PLACES, SENTENCES, SIZES, Statement

Split = Literal["iid", "balanced", "adv"]
Item = TypeVar("Item")

GRID = 3  # cells per side
CELL_PIXELS = 16
GLYPH_PIXELS = 10
IMAGE_PIXELS = GRID * CELL_PIXELS
BACKGROUND = 0.12

QUESTION = "is there a {}"  # the kind is its last word: the answer is one attention hop away
REQUEST = "describe the image"
FACTS_LEAD_IN = "facts :"


class SceneObject(NamedTuple):
    """One object: its kind, its cell (0 to 8, row by row) and its contrast (0 invisible, 1 opaque).

    In a world with attributes it has a size and a color, too.
    """

    kind: str
    cell: int
    contrast: float
    size: str = ""
    color: str = ""

    @property
    def statement(self) -> Statement:
        """What a true sentence says of it."""
        return Statement(self.kind, self.size, self.color, PLACES[self.cell % GRID] if self.size else "")


@dataclass(frozen=True)
class Scene:
    """What a picture shows: objects of distinct kinds in distinct cells."""

    objects: tuple[SceneObject, ...]

    @property
    def kinds(self) -> list[str]:
        """The kinds that are present, in the order in which they were drawn."""
        return [thing.kind for thing in self.objects]

    @property
    def statements(self) -> dict[str, Statement]:
        """Kind -> what a true sentence says of it."""
        return {thing.kind: thing.statement for thing in self.objects}


class Picture(NamedTuple):
    """A scene and one rendering of it."""

    scene: Scene
    image: Image.Image


@dataclass(frozen=True)
class World:
    """Which kinds exist, which accompany each other, how pictures look and how captions err.

    Two worlds with equal fields are the same world: names, glyphs and colors follow from `seed`. Scenes, pictures and
    texts are drawn with a generator that the caller passes.

    Attributes:
        seed: Chooses names, glyphs and colors.
        pairs: Number of anchors; each has one partner.
        neutral_kinds: Number of kinds that belong to no pair.
        partner_shift: Anchor i accompanies the partner kind of pair (i + shift) modulo `pairs`.
        partner_probability: P(partner present | anchor present) of the `iid` split and of the biased captions' images.
        balanced_partner_probability: The same for the `balanced` split, where a partner is uninformative.
        adversarial_partner_probability: The same for the `adv` split, where partners are mostly absent.
        contrast: Range of an object's contrast, uniform.
        faint_contrast: Range of a faint object's contrast.
        faint_probability: Share of faint objects.
        pixel_noise: Standard deviation of the noise on each pixel value (range 0 to 1).
        mention_probability: Biased captions: P(a present object is named).
        hallucination_probability: Biased captions: P(an absent partner is named after its anchor).
        random_object_probability: Biased captions: P(one absent object of any kind is named).
        answer_noise: Biased answers: P("yes" | question about the absent partner of a present anchor).
        min_anchors: A scene has this many anchors or one more. With 3, replies are some eight sentences long.
        attributes: Whether objects have sizes and colors, and sentences tell size, color and place. Those usual for
            the kind come as often as partners do, and biased captions assume them as often.
    """

    seed: int = 0
    pairs: int = 4
    neutral_kinds: int = 4
    partner_shift: int = 0
    partner_probability: float = 0.85
    balanced_partner_probability: float = 0.5
    adversarial_partner_probability: float = 0.1
    contrast: tuple[float, float] = (0.35, 1.0)
    faint_contrast: tuple[float, float] = (0.05, 0.25)
    faint_probability: float = 0.12
    pixel_noise: float = 0.10
    mention_probability: float = 0.95
    hallucination_probability: float = 0.75
    random_object_probability: float = 0.03
    answer_noise: float = 0.4
    min_anchors: int = 1
    attributes: bool = False

    def __post_init__(self):
        if not 1 <= self.min_anchors <= 3:
            raise ValueError(f"min_anchors={self.min_anchors}: a picture has room for 1 to 3, and one more.")
        if self.pairs < self.min_anchors + 1 or self.neutral_kinds < self.min_anchors + 2:
            raise ValueError(
                f"pairs={self.pairs}, neutral_kinds={self.neutral_kinds}: a scene holds up to {self.min_anchors + 1} "
                f"anchors and {self.min_anchors + 2} other objects. Use at least {self.min_anchors + 1} pairs and "
                f"{self.min_anchors + 2} neutral kinds."
            )
        if 2 * self.pairs + self.neutral_kinds > len(NOUNS):
            raise ValueError(
                f"pairs={self.pairs} and neutral_kinds={self.neutral_kinds} make "
                f"{2 * self.pairs + self.neutral_kinds} kinds, but there are {len(NOUNS)} nouns. Use fewer."
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability") and not 0.0 <= value <= 1.0:
                raise ValueError(f"{field.name}={value} is a probability: give a number from 0 to 1.")

    @cached_property
    def _appearance(self) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Names, glyphs (10, 10) of zeros and ones, and colors (3,) in 0 to 1."""
        rng = np.random.default_rng(1000 + self.seed)
        count = 2 * self.pairs + self.neutral_kinds
        kinds = [NOUNS[index] for index in rng.permutation(len(NOUNS))[:count]]
        bitmaps = distinct_bitmaps(count, rng)
        glyphs = [np.kron(bitmap, np.ones((2, 2))) for bitmap in bitmaps]
        colors = [np.array(colorsys.hsv_to_rgb(hue, 0.9, 0.95)) for hue in rng.permutation(count) / count]
        return kinds, dict(zip(kinds, glyphs, strict=True)), dict(zip(kinds, colors, strict=True))

    @property
    def kinds(self) -> list[str]:
        """All kinds: anchor and partner kinds in turn, then the neutral ones."""
        return self._appearance[0]

    @property
    def anchors(self) -> list[str]:
        """The kinds that are nearly always accompanied."""
        return self.kinds[: 2 * self.pairs : 2]

    @property
    def neutral(self) -> list[str]:
        """The kinds that belong to no pair."""
        return self.kinds[2 * self.pairs :]

    @cached_property
    def partner_of(self) -> dict[str, str]:
        """Anchor -> partner."""
        partners = self.kinds[1 : 2 * self.pairs : 2]
        return {
            anchor: partners[(index + self.partner_shift) % self.pairs] for index, anchor in enumerate(self.anchors)
        }

    @cached_property
    def anchor_of(self) -> dict[str, str]:
        """Partner -> anchor."""
        return {partner: anchor for anchor, partner in self.partner_of.items()}

    @cached_property
    def usual(self) -> dict[str, Statement]:
        """Kind -> the size and color that it usually has, with attributes. They follow from `seed`."""
        rng = np.random.default_rng(2000 + self.seed)
        return {kind: Statement(kind, _pick(rng, SIZES), _pick(rng, tuple(COLORS))) for kind in self.kinds}

    @property
    def max_caption_tokens(self) -> int:
        """How many tokens a caption may take: those of more sentences than any scene has objects."""
        return (6 + 2 * self.min_anchors) * (10 if self.attributes else 5)

    # ---- scenes and pictures

    def scene(self, rng: np.random.Generator, split: Split = "iid") -> Scene:
        """Draws a scene: anchors (one or two), their partners by chance, others, distinct cells.

        Where partners are rare, more fillers are added, as many as there are partners less on average, so that splits
        agree in the number of objects.
        """
        probability = self.partner_probability_in(split)
        anchors = _sample(rng, self.anchors, self.min_anchors + int(rng.random() < 0.5))
        kinds = []
        for anchor in anchors:
            kinds.append(anchor)
            if rng.random() < probability:
                kinds.append(self.partner_of[anchor])
        fillers = self.neutral + [partner for partner, anchor in self.anchor_of.items() if anchor not in anchors]
        count = int(rng.choice(3, p=[0.3, 0.4, 0.3]))
        more = (self.min_anchors + 0.5) / self.min_anchors * (self.partner_probability - probability)
        count += sum(rng.random() < more for _ in range(self.min_anchors))
        kinds += _sample(rng, fillers, min(count, GRID * GRID - len(kinds)))
        cells = rng.choice(GRID * GRID, len(kinds), replace=False)
        things = (SceneObject(k, int(cell), self._contrast(rng)) for k, cell in zip(kinds, cells, strict=True))
        if self.attributes:
            things = (self._with_attributes(thing, rng, probability) for thing in things)
        return Scene(tuple(things))

    def _with_attributes(self, thing: SceneObject, rng: np.random.Generator, probability: float) -> SceneObject:
        """The object with its kind's usual size and color, each with `probability`, or else another."""
        usual = self.usual[thing.kind]
        drawn = []
        for value, values in ((usual.size, SIZES), (usual.color, tuple(COLORS))):
            others = [other for other in values if other != value]
            drawn.append(value if rng.random() < probability else _pick(rng, others))
        return thing._replace(size=drawn[0], color=drawn[1])

    def partner_probability_in(self, split: Split) -> float:
        """P(partner present | anchor present) in a split."""
        probabilities = {
            "iid": self.partner_probability,
            "balanced": self.balanced_partner_probability,
            "adv": self.adversarial_partner_probability,
        }
        if split not in probabilities:
            raise ValueError(f"Unknown split {split!r}; use one of {sorted(probabilities)}.")
        return probabilities[split]

    def _contrast(self, rng: np.random.Generator) -> float:
        faint = rng.random() < self.faint_probability
        return float(rng.uniform(*(self.faint_contrast if faint else self.contrast)))

    def render(self, scene: Scene, rng: np.random.Generator) -> Image.Image:
        """Paints a scene: 48 x 48 RGB, each glyph blended into its cell, noise on every pixel."""
        canvas = np.full((IMAGE_PIXELS, IMAGE_PIXELS, 3), BACKGROUND) + rng.normal(0, 0.03, 3)
        for thing in scene.objects:
            glyph, color = self._look(thing)
            low, high = (0, 2) if len(glyph) > GLYPH_PIXELS else (2, 5)  # where in its cell it may begin
            top = thing.cell // GRID * CELL_PIXELS + int(rng.integers(low, high))
            left = thing.cell % GRID * CELL_PIXELS + int(rng.integers(low, high))
            area = (slice(top, top + len(glyph)), slice(left, left + len(glyph)))
            cover = glyph[..., None] * thing.contrast  # (10, 10, 1), or (15, 15, 1)
            canvas[area] = canvas[area] * (1 - cover) + color * cover
        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * self.pixel_noise
        return _to_image(canvas)

    def _look(self, thing: SceneObject) -> tuple[np.ndarray, np.ndarray]:
        """Glyph and color of an object: those of its kind, or with attributes its own size and color."""
        _, glyphs, colors = self._appearance
        glyph = glyphs[thing.kind]
        if not thing.color:
            return glyph, colors[thing.kind]
        if thing.size == "large":
            glyph = np.kron(glyph[::2, ::2], np.ones((3, 3)))
        return glyph, np.array(colorsys.hsv_to_rgb(COLORS[thing.color], 0.9, 0.95))

    def picture(self, rng: np.random.Generator, split: Split = "iid") -> Picture:
        """Draws a scene and paints it."""
        scene = self.scene(rng, split)
        return Picture(scene, self.render(scene, rng))

    def pictures(self, count: int, seed: int, split: Split = "iid") -> list[Picture]:
        """Pictures `0` to `count - 1` of a seed and split; each depends on its index and not on `count`."""
        return [self.picture(generator(seed, index, split), split) for index in range(count)]

    # ---- what is said

    def caption(self, scene: Scene, rng: np.random.Generator, *, biased: bool) -> str:
        """One sentence per object. Biased captions forget some objects and assume absent partners.

        With attributes they also assume the usual size and color of what they name.
        """
        kinds = self._biased_kinds(scene, rng) if biased else scene.kinds
        ordered = self._reading_order(kinds, rng)
        if not self.attributes:
            return " ".join(sentence(kind, rng) for kind in ordered)
        return " ".join(sentence(self._said(kind, scene, rng, biased).phrase, rng) for kind in ordered)

    def _said(self, kind: str, scene: Scene, rng: np.random.Generator, biased: bool) -> Statement:
        """What a caption says of a kind: the truth; if biased, at times what is usual; of what is absent, always."""
        usual, true = self.usual[kind], scene.statements.get(kind)
        if true is None:
            return usual._replace(place=_pick(rng, PLACES))
        assumed = [biased and rng.random() < self.hallucination_probability for _ in range(2)]
        size, color = (usual.size if assumed[0] else true.size), (usual.color if assumed[1] else true.color)
        return true._replace(size=size, color=color)

    def _biased_kinds(self, scene: Scene, rng: np.random.Generator) -> list[str]:
        present = scene.kinds
        named = [kind for kind in present if rng.random() < self.mention_probability]
        for anchor in present:
            partner = self.partner_of.get(anchor)
            # The draw is made last: a caption that omitted the anchor does not mention its partner either.
            if anchor in named and partner not in (None, *present) and rng.random() < self.hallucination_probability:
                named.append(partner)
        if rng.random() < self.random_object_probability:
            named.append(_pick(rng, [kind for kind in self.kinds if kind not in present and kind not in named]))
        return named or present[:1]

    def _reading_order(self, kinds: Sequence[str], rng: np.random.Generator) -> list[str]:
        """Shuffles kinds, a partner right after its anchor."""
        groups = []
        for kind in kinds:
            if self.anchor_of.get(kind) in kinds:
                continue
            partner = self.partner_of.get(kind)
            groups.append([kind, partner] if partner in kinds else [kind])
        return [kind for index in rng.permutation(len(groups)) for kind in groups[index]]

    def facts(self, scene: Scene, rng: np.random.Generator) -> list[str]:
        """The true kinds, shuffled: one fact each."""
        return _sample(rng, scene.kinds, len(scene.objects))

    def absent_kind(self, scene: Scene, rng: np.random.Generator, *, adversarial: bool) -> str:
        """An absent kind; if adversarial, the absent partner of a present anchor, if there is one."""
        present = scene.kinds
        missing = sorted(self.missing_partners(scene))
        if adversarial and missing:
            return _pick(rng, missing)
        return _pick(rng, [kind for kind in self.kinds if kind not in present])

    def missing_partners(self, scene: Scene) -> list[str]:
        """Absent partners of the present anchors: suggested by the prior, and not in the picture."""
        present = scene.kinds
        partners = (self.partner_of[kind] for kind in present if kind in self.partner_of)
        return [partner for partner in partners if partner not in present]

    def question(self, scene: Scene, rng: np.random.Generator, *, biased: bool) -> tuple[str, str]:
        """A yes / no question and its answer; half are yes, half of the others adversarial.

        Biased answers say "yes" to a missing partner with probability `answer_noise`.
        """
        if rng.random() < 0.5:
            return QUESTION.format(_pick(rng, scene.kinds)), "yes"
        kind = self.absent_kind(scene, rng, adversarial=rng.random() < 0.5)
        flipped = biased and self.anchor_of.get(kind) in scene.kinds and rng.random() < self.answer_noise
        return QUESTION.format(kind), "yes" if flipped else "no"

    # ---- files

    def save(self, folder: str | Path) -> None:
        """Writes `world.json` into a folder, beside the model that was trained in this world."""
        Path(folder, "world.json").write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "World":
        """Reads `world.json` from a folder."""
        values: dict[str, Any] = json.loads(Path(folder, "world.json").read_text())
        # JSON has lists for tuples.
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values)


def generator(seed: int, index: int, stream: str) -> np.random.Generator:
    """The generator of example `index` of a stream; streams of different names share nothing, whatever their seeds."""
    return np.random.default_rng([seed, index, zlib.crc32(stream.encode())])


def sentence(phrase: str, rng: np.random.Generator) -> str:
    """One of the two wordings, which mean the same."""
    return _pick(rng, SENTENCES).format(phrase)


def with_facts(text: str, facts: Sequence[str]) -> str:
    """A request that begins with facts, for the supervised stage alone, where the model learns to read them."""
    return f"{FACTS_LEAD_IN} {' '.join(facts)} . {text}"


def weaken_vision(image: Image.Image, noise: float = 0.4) -> Image.Image:
    """The picture as weak eyes see it: more noise on every pixel (standard deviation, range 0 to 1).

    The noise is seeded by the picture itself, so that one picture always looks the same to them.
    """
    pixels = np.asarray(image.convert("RGB"))
    rng = np.random.default_rng(zlib.crc32(pixels.tobytes()))
    return _to_image(pixels / 255 + rng.standard_normal(pixels.shape) * noise)


def _to_image(canvas: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))


def _pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _sample(rng: np.random.Generator, items: Sequence[Item], count: int) -> list[Item]:
    return [items[index] for index in rng.choice(len(items), count, replace=False)]
