"""BDHS: rejected replies that a model writes itself while most image tokens are masked."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from os import PathLike
from typing import Any, ClassVar, NamedTuple, cast

import torch
from PIL.Image import Image
from torch import Tensor

from trl_vlm.data.encoding import encode
from trl_vlm.data.errors import RowError
from trl_vlm.data.images import MAX_IMAGE_PIXELS
from trl_vlm.data.rows import Row, name_of
from trl_vlm.models.continuation.continuations import Continuation, Continuations
from trl_vlm.models.image_tokens import image_token_mask
from trl_vlm.models.masked_images import draw_hidden
from trl_vlm.models.memory import GIB
from trl_vlm.models.sampling import GumbelSampler
from trl_vlm.pairs.bdhs.guided import cut_sentences, joined
from trl_vlm.pairs.bdhs.similarity import DEFAULT_ENCODER, SentenceEncoder, Similarity
from trl_vlm.pairs.draws import Draws
from trl_vlm.pairs.noise import Overflow, check_noise, distorted_images
from trl_vlm.pairs.reply_tokens import ReplyTokens, added_text
from trl_vlm.pairs.samples import (
    CACHE_HELP,
    EMPTY_SAMPLE,
    MAX_CACHE_GIB,
    SAME_AS_REFERENCE,
    check_cache,
    check_sampling,
    preference_row,
)
from trl_vlm.pairs.source import Deferred, Policy, images_of, reference_reply, row_draws


@dataclass(eq=False)
class BDHS:
    """A pair source: the reference is chosen; the policy rewrites it with most of the image masked, which is rejected.

    Each sentence of the reference is cut at a random word, and the policy completes it while most of the image is
    hidden from its attention: it names what is usually there. Sentences are independent of each other, so they are
    generated in one batch. If the result is too similar to the reference, mask, cuts and samples are drawn again; the
    last of several iterations writes a whole reply without the reference.

    A row gets `chosen`, `rejected`, and
        pair_source: "bdhs".
        pair_iterations: How many iterations it took, from 1 to `iterations`.
        pair_guided: Whether the rejected reply was guided by the reference.
        pair_similarity: The gate's similarity of the two replies; an unguided reply is not gated.
        pair_masked_ratio: The share of its image tokens that was hidden, as drawn.
        pair_unfinished: Whether `max_new_tokens`, or `max_sentence_tokens` in a sentence, ended it.
    A row whose last attempt is empty or equal to the reference gives None.

    Args:
        similarity: The gate: folder or hub id of a sentence encoder, a `SentenceEncoder`, or any function of two
            lists of texts.
        mask_ratio: The expected share of hidden image tokens, rho_th in the paper; 0 hides none, 1 all.
        noise_steps: Also distort the image with this many steps of noise, drawn again in each iteration. The paper's
            BDHS with noise is `mask_ratio=0, noise_steps=500`.
        iterations: How many attempts a row gets; the last of several is unguided. With 1 it is guided, and not gated.
        threshold: A reply is accepted if its similarity is smaller.
        guided: False skips the guided iterations: one unguided reply, not gated ("mask only" in the paper).
        temperature: Of the samples; 0 is greedy, and then only masks and cuts differ between iterations.
        max_new_tokens: Longest unguided reply, in tokens.
        max_sentence_tokens: Longest continuation of a sentence, in tokens.
        noise_overflow: How colors out of range are treated, "wrap" or "clip"; see `distorted`.
        max_cache_gib: Most keys and values at once, in GiB; sentences that need more are completed in turns.
        max_image_pixels: Largest image, width times height.
        seed: Of all draws. The same seed gives the same pairs, whatever the batches and processes.

    Attributes:
        dropped: Why rows gave no pair, counted since the source was made.

    Source: arXiv:2407.02477, section 5, eq. 6 and 7, Algorithm 1.
    Differs: the paper does not specify positions (kept), the temperature (1), the splitter and the unit of cuts
    (`data.sentences`; one word at least stays and one goes, and a sentence of one word is regenerated). A
    reference without any sentence end is one sentence. Yes and no are swapped at word boundaries only, and the
    cut is never before the swapped word.
    """

    name: ClassVar[str] = "bdhs"
    needs_policy: ClassVar[bool] = True
    not_about_answers: ClassVar[frozenset[str]] = frozenset({"max_cache_gib"})

    similarity: str | PathLike | Similarity = field(
        default=DEFAULT_ENCODER,
        metadata={"help": "The gate that compares replies.", "options": SentenceEncoder},
    )
    _: KW_ONLY
    mask_ratio: float = field(default=0.99, metadata={"help": "Expected share of hidden image tokens, 0 to 1."})
    noise_steps: int | None = field(
        default=None, metadata={"help": "Also distort the image, by this many steps of noise, up to 1000."}
    )
    iterations: int = field(
        default=5, metadata={"help": "Attempts per row; the last of several is not guided by the reference."}
    )
    threshold: float = field(
        default=0.97, metadata={"help": "A reply is accepted if its similarity to the reference is smaller."}
    )
    guided: bool = field(
        default=True, metadata={"help": "Complete the sentences of the reference; otherwise one whole reply, no gate."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples; 0 is greedy decoding."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest unguided reply, in tokens."})
    max_sentence_tokens: int = field(default=64, metadata={"help": "Longest continuation of a sentence, in tokens."})
    noise_overflow: Overflow = field(
        default="wrap", metadata={"help": "How colors that the noise takes out of range are treated."}
    )
    max_cache_gib: float = field(default=MAX_CACHE_GIB, metadata={"help": CACHE_HELP})
    max_image_pixels: int | None = field(
        default=MAX_IMAGE_PIXELS, metadata={"help": "Largest image, width times height."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})
    dropped: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses options out of range, and makes the gate of the name of an encoder."""
        check_sampling(self.temperature, self.max_new_tokens)
        _check_ranges(self.threshold, self.mask_ratio, self.iterations, self.max_sentence_tokens)
        check_noise(self.noise_steps or 0, overflow=self.noise_overflow)
        check_cache(self.max_cache_gib)
        if isinstance(self.similarity, str | PathLike):
            self.similarity = SentenceEncoder(self.similarity)

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | None]:
        """A preference row for each of `rows`, as `PairSource` says.

        Raises:
            ValueError: A row has no image, no prompt or no reference reply; the error names it.
        """
        references, scene, pairs = self._begun(rows, policy, round)
        waiting = [index for index in range(len(rows)) if index not in pairs]
        if waiting:
            if scene is None or self.noise_steps:
                scene = self._scene(references, policy, self.iterations)
            pairs |= self._iteration(scene, waiting, self.iterations)
        return [pairs[index] for index in range(len(rows))]

    @torch.no_grad()
    def begin(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | Deferred | None]:
        """As a call, but rows that no guided iteration settled wait for those of other batches.

        Their last iteration writes whole replies, in as many steps for few rows as for many.
        """
        references, _, pairs = self._begun(rows, policy, round)
        return [
            pairs[index] if index in pairs else Deferred(self._finished, reference)
            for index, reference in enumerate(references)
        ]

    @torch.no_grad()
    def _finished(self, references: Sequence["_Reference"], policy: Policy) -> list[Row | None]:
        """The pairs of the last iteration, of rows of any batches."""
        scene = self._scene(references, policy, self.iterations)
        pairs = self._iteration(scene, list(range(len(references))), self.iterations)
        return [pairs[index] for index in range(len(references))]

    def _begun(
        self, rows: Sequence[Row], policy: Policy, round: int
    ) -> "tuple[list[_Reference], _Scene | None, dict[int, Row | None]]":
        """All iterations but the last of several, which is unguided: the rows, their scene, and the pairs so far."""
        references = [self._reference(row, index, policy, round) for index, row in enumerate(rows)]
        pairs: dict[int, Row | None] = {}
        scene = None
        for iteration in range(1, max(2, self.iterations) if self.guided else 2):
            active = [index for index in range(len(rows)) if index not in pairs]
            if not active:
                break
            if scene is None or self.noise_steps:  # with noise, each iteration sees other images
                scene = self._scene(references, policy, iteration)
            pairs |= self._iteration(scene, active, iteration)
        return references, scene, pairs

    def _iteration(self, scene: "_Scene", active: Sequence[int], iteration: int) -> "dict[int, Row | None]":
        """The pairs of those active rows whose attempt is taken; the last iteration takes all."""
        last = self.iterations if self.guided else 1
        is_guided = self.guided and (last == 1 or iteration < last)
        return {
            index: self._pair(scene.references[index], attempt)
            for index, attempt in self._attempts(scene, active, iteration, is_guided).items()
            if iteration == last or (attempt.is_new and attempt.similarity < self.threshold)
        }

    def _scene(self, references: Sequence["_Reference"], policy: Policy, iteration: int) -> "_Scene":
        images = [self._visible_images(reference, iteration) for reference in references]
        return _Scene.of(policy, references, images)

    def _reference(self, row: Row, index: int, policy: Policy, round: int) -> "_Reference":
        name = name_of(row, index)
        images = images_of(row, name, self.max_image_pixels)
        if not images:
            raise RowError(
                f"{name}: it has no image, and BDHS hides images from the model. Drop rows without images, or take "
                "their pairs from another source."
            )
        tokens = ReplyTokens.of(policy.processor, reference_reply(row, name).strip())
        return _Reference(row, name, images, tokens, row_draws(row, index, self.seed, round))

    def _visible_images(self, reference: "_Reference", iteration: int) -> list[Image]:
        """The images of a row in one iteration, with new noise if there is noise."""
        if not self.noise_steps:
            return reference.images
        return distorted_images(
            reference.images, self.noise_steps, reference.draws, iteration, overflow=self.noise_overflow
        )

    def _attempts(
        self, scene: "_Scene", active: Sequence[int], iteration: int, is_guided: bool
    ) -> dict[int, "_Attempt"]:
        """One more reply for each active row."""
        hidden = draw_hidden(
            scene.input_ids,
            scene.policy.model.config,
            self.mask_ratio,
            [reference.draws.generator("mask", iteration) for reference in scene.references],
            [reference.name for reference in scene.references],
        )
        images = image_token_mask(scene.input_ids, scene.policy.model.config)
        shares = (hidden.sum(1) / images.sum(1)).tolist()
        replies = (self._guided if is_guided else self._unguided)(scene, active, hidden, iteration)
        similarities = self._similarities([scene.references[index] for index in active], replies)
        return {
            index: _Attempt(
                reply.text,
                is_new=reply.text not in ("", scene.references[index].tokens.text),
                similarity=similarity,
                metadata={
                    "iterations": iteration,
                    "guided": is_guided,
                    # The last digits of an embedding depend on the texts that are encoded beside it.
                    "similarity": round(similarity, 6),
                    "masked_ratio": shares[index],
                    "unfinished": reply.is_unfinished,
                },
            )
            for index, reply, similarity in zip(active, replies, similarities, strict=True)
        }

    def _guided(self, scene: "_Scene", active: Sequence[int], hidden: Tensor, iteration: int) -> list["_Reply"]:
        """Each row's reference, with its sentences completed by the policy."""
        tokenizer = scene.policy.processor.tokenizer
        sentences = [
            sentence
            for index in active
            for sentence in cut_sentences(
                scene.references[index].tokens,
                tokenizer,
                scene.references[index].draws,
                row=index,
                iteration=iteration,
            )
        ]
        completions = scene.continuations.run(
            hidden,
            [sentence.continuation for sentence in sentences],
            max_new_tokens=self.max_sentence_tokens,
            stop=lambda number, new: sentences[number].is_over(tokenizer, new),
            sampler=GumbelSampler([sentence.seed for sentence in sentences], self.temperature),
            max_cache_bytes=self.max_cache_gib * GIB,
        )
        replies = []
        for index in active:
            of_row = [number for number, sentence in enumerate(sentences) if sentence.continuation.row == index]
            new = [completions[number] for number in of_row]
            text = joined([sentences[number] for number in of_row], new, tokenizer)
            replies.append(_Reply(text, any(len(tokens) == self.max_sentence_tokens for tokens in new)))
        return replies

    def _unguided(self, scene: "_Scene", active: Sequence[int], hidden: Tensor, iteration: int) -> list["_Reply"]:
        """Whole replies of the policy, without the reference."""
        references = [scene.references[index] for index in active]
        openings = [reference.tokens.ids[: reference.tokens.tokens_before(0)] for reference in references]
        completions = scene.continuations.run(
            hidden,
            [Continuation(index, len(opening)) for index, opening in zip(active, openings, strict=True)],
            max_new_tokens=self.max_new_tokens,
            sampler=GumbelSampler(
                [reference.draws.seed_of("tokens", iteration) for reference in references], self.temperature
            ),
            max_cache_bytes=self.max_cache_gib * GIB,
        )
        tokenizer = scene.policy.processor.tokenizer
        return [
            _Reply(added_text(tokenizer, opening, new).strip(), len(new) == self.max_new_tokens)
            for opening, new in zip(openings, completions, strict=True)
        ]

    def _similarities(self, references: Sequence["_Reference"], replies: Sequence["_Reply"]) -> list[float]:
        texts = [reference.tokens.text for reference in references]
        compare = cast(Similarity, self.similarity)  # since `__post_init__`
        values = list(compare([reply.text for reply in replies], texts))
        if len(values) != len(replies):
            raise ValueError(
                f"The similarity gate returned {len(values)} values for {len(replies)} pairs of texts; it must return "
                "one per pair."
            )
        for reference, value in zip(references, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"{reference.name}: the similarity gate returned {value} for it. Check the encoder: its weights "
                    "or its precision produce NaN."
                )
        return [float(value) for value in values]

    def _pair(self, reference: "_Reference", attempt: "_Attempt") -> Row | None:
        if not attempt.is_new:
            self.dropped[SAME_AS_REFERENCE if attempt.text else EMPTY_SAMPLE] += 1
            return None
        text = reference.tokens.text
        return preference_row(reference.row, text, attempt.text, source=self.name, **attempt.metadata)


class _Reference(NamedTuple):
    """A row: its name and images, the reply to be corrupted, its random draws."""

    row: Row
    name: str
    images: list[Image]
    tokens: ReplyTokens
    draws: Draws


class _Scene(NamedTuple):
    """All rows as a batch: `input_ids` (B, T), and what continues their replies."""

    policy: Policy
    references: Sequence[_Reference]
    input_ids: Tensor
    continuations: Continuations

    @classmethod
    def of(cls, policy: Policy, references: Sequence[_Reference], images: Sequence[Sequence[Image]]) -> "_Scene":
        batch = encode(
            policy.processor,
            [reference.row["prompt"] for reference in references],
            images,
            add_generation_prompt=True,
            names=[reference.name for reference in references],
            max_pixels=None,  # they are loaded already
        )
        replies = [reference.tokens.ids for reference in references]
        return cls(policy, references, batch["input_ids"], Continuations(policy.model, batch, replies))


class _Reply(NamedTuple):
    """A reply, and whether the token limit ended it or one of its sentences."""

    text: str
    is_unfinished: bool


class _Attempt(NamedTuple):
    """A reply that may become the rejected one; `is_new` if it is not empty and differs from the reference."""

    text: str
    is_new: bool
    similarity: float
    metadata: dict[str, Any]


def _check_ranges(threshold: float, mask_ratio: float, iterations: int, max_sentence_tokens: int) -> None:
    ranges = {
        "threshold": (threshold, math.isfinite(threshold), "a number; a reply below it is accepted"),
        "mask_ratio": (mask_ratio, 0 <= mask_ratio <= 1, "from 0 (nothing hidden) to 1 (all hidden)"),
        "iterations": (iterations, iterations >= 1, "1 or more"),
        "max_sentence_tokens": (max_sentence_tokens, max_sentence_tokens >= 1, "1 or more"),
    }
    for name, (value, is_in_range, wanted) in ranges.items():
        if not is_in_range:
            raise ValueError(f"`{name}` is {value}; it must be {wanted}.")
