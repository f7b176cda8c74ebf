"""Rejected replies that the policy ends without the image, from half of the reference on: InternVL's DropoutNTP."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from trl_vlm.data.encoding import encode
from trl_vlm.data.errors import RowError
from trl_vlm.data.images import MAX_IMAGE_PIXELS
from trl_vlm.data.messages import Message, is_image_place
from trl_vlm.data.rows import Row, name_of
from trl_vlm.models.continuation.continuations import Continuation, Continuations
from trl_vlm.models.image_tokens import image_token_mask
from trl_vlm.models.memory import GIB
from trl_vlm.models.sampling import GumbelSampler
from trl_vlm.pairs.reply_tokens import ReplyTokens, added_text
from trl_vlm.pairs.samples import (
    CACHE_HELP,
    MAX_CACHE_GIB,
    SAME_AS_REFERENCE,
    check_cache,
    check_sampling,
    preference_row,
)
from trl_vlm.pairs.source import Policy, images_of, reference_reply, row_draws

ONE_WORD = "the reply has one word"
NOTHING_ADDED = "nothing was added to the kept words"
WORD_END = re.compile(r"(?<=\S)(?=\s|$)")

Without = Literal["masked", "removed"]


@dataclass(eq=False, kw_only=True)
class DropoutNTP:
    """A pair source: the reference is chosen; its first words, continued by the policy without the image, rejected.

    What the policy adds rests on the words alone: on what is usually there. It is BDHS without any of its parts: one
    cut in place of one in each sentence, the whole image hidden, nothing joined again, no gate.

    A row gets `chosen`, `rejected`, and
        pair_source: "dropout-ntp".
        pair_kept_words: How many words of the reference the rejected reply begins with.
        pair_unfinished: Whether `max_new_tokens` ended it.
    A reference of one word, and a continuation that adds nothing or the reference's own rest, give None.

    Args:
        start_ratio: The share of the reference's words that is kept; one at least is, and one at least goes.
        without: "removed": the prompt has no image at all, as in the published recipe. "masked": nothing attends to
            the image, whose tokens keep their places, as in BDHS with a mask of 1; what differs from BDHS is then the
            cut alone.
        temperature: Of the continuation; 0 is greedy decoding.
        max_new_tokens: Longest continuation, in tokens.
        max_cache_gib: Most keys and values at once, in GiB.
        max_image_pixels: Largest image, width times height.
        seed: Of the continuations.

    Attributes:
        dropped: Why rows gave no pair, counted since the source was made.

    Source: Dropout Next-Token Prediction of arXiv:2411.10442 (InternVL's MPO): half of the reply, no image.
    Differs: one continuation, sampled at temperature 1, which is our choice.
    """

    name: ClassVar[str] = "dropout-ntp"
    needs_policy: ClassVar[bool] = True
    not_about_answers: ClassVar[frozenset[str]] = frozenset({"max_cache_gib"})

    start_ratio: float = field(default=0.5, metadata={"help": "Share of the reference's words that is kept."})
    without: Without = field(
        default="removed", metadata={"help": "The image is removed from the prompt, or its tokens are masked."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples; 0 is greedy decoding."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest continuation, in tokens."})
    max_cache_gib: float = field(default=MAX_CACHE_GIB, metadata={"help": CACHE_HELP})
    max_image_pixels: int | None = field(
        default=MAX_IMAGE_PIXELS, metadata={"help": "Largest image, width times height."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    dropped: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses options out of range."""
        check_sampling(self.temperature, self.max_new_tokens)
        check_cache(self.max_cache_gib)
        if not 0 < self.start_ratio < 1:
            raise ValueError(f"`start_ratio` is {self.start_ratio}; it must be above 0 and below 1.")
        if self.without not in ("masked", "removed"):
            raise ValueError(f"`without` is {self.without!r}; it must be 'masked' or 'removed'.")

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], policy: Policy, round: int = 0) -> list[Row | None]:
        """A preference row for each of `rows`, as `PairSource` says.

        Raises:
            ValueError: A row has no image, no prompt or no reference reply; the error names it.
        """
        names = [name_of(row, index) for index, row in enumerate(rows)]
        replies = [
            ReplyTokens.of(policy.processor, reference_reply(row, name).strip())
            for row, name in zip(rows, names, strict=True)
        ]
        batch = self._batch(rows, policy, names)
        cuts = {
            index: cut_reply(reply, policy, self.start_ratio)
            for index, reply in enumerate(replies)
            if len(word_ends(reply.text)) > 1
        }
        self.dropped[ONE_WORD] += len(rows) - len(cuts)
        new = self._continued(rows, policy, batch, replies, cuts, round) if cuts else {}
        pairs: list[Row | None] = [None] * len(rows)
        for index, cut in cuts.items():
            pairs[index] = self._pair(rows[index], replies[index], cut, new[index], policy)
        return pairs

    def _batch(self, rows: Sequence[Row], policy: Policy, names: Sequence[str]) -> dict[str, Tensor]:
        images = [images_of(row, name, self.max_image_pixels) for row, name in zip(rows, names, strict=True)]
        for own, name in zip(images, names, strict=True):
            if not own:
                raise RowError(
                    f"{name}: it has no image, and this source takes it away. Drop rows without images, or take "
                    "their pairs from another source."
                )
        is_removed = self.without == "removed"
        return encode(
            policy.processor,
            [without_images(row["prompt"]) if is_removed else row["prompt"] for row in rows],
            [[] for _ in images] if is_removed else images,
            add_generation_prompt=True,
            names=names,
            max_pixels=None,  # they are loaded already
        )

    def _continued(
        self,
        rows: Sequence[Row],
        policy: Policy,
        batch: dict[str, Tensor],
        replies: Sequence[ReplyTokens],
        cuts: "dict[int, Cut]",
        round: int,
    ) -> dict[int, list[int]]:
        """The new tokens of each row that has a cut."""
        hidden = image_token_mask(batch["input_ids"], policy.model.config)  # without images none
        new = Continuations(policy.model, batch, [reply.ids for reply in replies]).run(
            hidden,
            [Continuation(index, cut.kept_tokens, cut.forced_tokens) for index, cut in cuts.items()],
            max_new_tokens=self.max_new_tokens,
            sampler=GumbelSampler(
                [row_draws(rows[index], index, self.seed, round).seed_of("tokens") for index in cuts], self.temperature
            ),
            max_cache_bytes=self.max_cache_gib * GIB,
        )
        return dict(zip(cuts, new, strict=True))

    def _pair(
        self, row: Row, reply: ReplyTokens, cut: "Cut", new: Sequence[int], policy: Policy
    ) -> dict[str, Any] | None:
        context = [*reply.ids[: cut.kept_tokens], *cut.forced_tokens]
        added = added_text(policy.processor.tokenizer, context, new)
        text = (reply.text[: cut.end] + added).strip()
        if not added.strip() or text == reply.text:
            self.dropped[SAME_AS_REFERENCE if added.strip() else NOTHING_ADDED] += 1
            return None
        return preference_row(
            row,
            reply.text,
            text,
            source=self.name,
            kept_words=cut.words,
            unfinished=len(new) == self.max_new_tokens,
        )


class Cut(NamedTuple):
    """Where a reply is cut.

    Args:
        words: How many words are kept.
        end: Where the last one ends, in characters.
        kept_tokens: How many of the reply's tokens are kept.
        forced_tokens: Tokens of the rest of the kept words, where no token ends with the last one.
    """

    words: int
    end: int
    kept_tokens: int
    forced_tokens: list[int]


def cut_reply(reply: ReplyTokens, policy: Policy, ratio: float) -> Cut:
    """The cut behind a share of a reply's words: one at least is kept, and one at least goes.

    Args:
        reply: Of two words or more.
        policy: Whose tokens they are.
        ratio: The share of the words, rounded down.
    """
    ends = word_ends(reply.text)
    words = min(max(1, int(len(ends) * ratio)), len(ends) - 1)
    end = ends[words - 1]
    kept = sum(place <= end for place in reply.ends)
    reached = max(0, reply.ends[kept - 1]) if kept else 0
    missing = reply.text[reached:end]
    forced = reply.ids_behind(policy.processor.tokenizer, reached, missing) if missing else []
    return Cut(words, end, kept, forced)


def word_ends(text: str) -> list[int]:
    """Where each word of a text ends; words are what stands between white space."""
    return [match.start() for match in WORD_END.finditer(text)]


def without_images(messages: Sequence[Message]) -> list[Message]:
    """The messages without the places of images; a turn of images alone is an empty one."""
    return [
        message
        if not isinstance(message.get("content"), list | tuple)
        else {**message, "content": [part for part in message["content"] if not is_image_place(part)]}
        for message in messages
    ]
