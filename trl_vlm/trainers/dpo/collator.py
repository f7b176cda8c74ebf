"""Batches of preference pairs: TRL's collator makes them, and ours adds further keys."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Required, TypedDict, cast

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from trl_vlm.data.errors import RowError, as_row_errors
from trl_vlm.data.faults import EMPTY_REPLY
from trl_vlm.data.images import load_image
from trl_vlm.data.messages import without_empty_keys
from trl_vlm.data.rows import ROW_NAME, check_row, name_of, row_images
from trl_vlm.models.image_tokens import check_image_tokens, image_tokens
from trl_vlm.models.prefix_sharing.sharing import SHARED_PREFIX
from trl_vlm.trainers.dpo.segments import SegmentOptions, segments_of

Row = dict[str, Any]

# Batch keys, see `PreferenceCollator`.
REFERENCE: Final = "reference_log_probs"
NUM_REPLIES: Final = "num_replies"


class PreferenceBatch(TypedDict, total=False):
    """The batch of `PreferenceCollator`: TRL's, further keys, and the pixels."""

    input_ids: Required[Tensor]
    attention_mask: Required[Tensor]
    completion_mask: Required[Tensor]
    shared_prefix: Tensor
    changed_tokens: Tensor
    token_weights: Tensor
    score_weights: Tensor
    reference_log_probs: Tensor
    num_replies: int
    distorted: dict[str, Any]  # see `DistortingCollator`
    weightless: bool  # see `FreshPairs`
    image_pair: dict[str, Any]  # see `ImagePairCollator`


class ImagesOnce:
    """A processor for TRL's vision collator, which encodes each prompt and its images twice: here it happens once.

    The token tensors come back repeated, as TRL expects them; pixels, and the inputs that belong to them, once per
    row.
    """

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor
        self.rows = 0

    def __getattr__(self, name: str) -> Any:
        if name == "processor":  # not set yet while unpickling in a worker
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, *, text: list[str], **kwargs: Any) -> BatchFeature:
        """As the processor, but prompts (the call with `images`) are given `rows` at a time."""
        if "images" not in kwargs:
            return self.processor(text=text, **kwargs)
        rows, copies = self.rows, len(text) // self.rows
        for row, prompt in enumerate(text):
            if prompt != text[row % rows]:
                raise ValueError(
                    f"The chat template renders one prompt in two ways, depending on the reply: {text[row % rows]!r} "
                    f"and {prompt!r}. Use a template that does not, or set `share_prefix=False`."
                )
        images = kwargs.pop("images")
        batch = self.processor(images=None if images is None else images[:rows], text=text[:rows], **kwargs)
        shape = batch["input_ids"].shape
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.shape == shape:
                batch[name] = value.repeat(copies, 1)
        return batch


class PreferenceCollator:
    """Adds the keys that shared prefixes, Dense DPO and further rejected replies need to TRL's preference batch.

    The batch holds K replies to each of P rows, (K * P, T): P chosen, P rejected, then P of each extra column.

    Keys that are added:
        shared_prefix: (K * P, 2), with `shares_prefix`; pixels then come once per row.
        changed_tokens, token_weights, score_weights: With `segments`; see `segments.Segments`.
        reference_log_probs: (K * P, T - 1), with `reference`.
        num_replies: K, where it is not 2.

    Args:
        collate: TRL's collator; for rows with images its `processor` is replaced.
        vision: Whether rows hold images (and text), or token ids.
        tokenizer: Decodes replies to find character spans.
        extra: How many replies `rejected_extra` holds in each row.
        shares_prefix: Whether the model shares prefixes.
        segments: How to find changed tokens.
        reference: Gives the reference log-probabilities of a row's replies, one tensor per reply.
        count_image_tokens: Refuse rows whose placeholders are not as many as their images have features.
    """

    def __init__(
        self,
        collate: Any,
        *,
        vision: bool,
        tokenizer: PreTrainedTokenizerBase,
        extra: int = 0,
        shares_prefix: bool = False,
        segments: SegmentOptions | None = None,
        reference: Callable[[Row], Sequence[Tensor]] | None = None,
        count_image_tokens: bool = True,
    ):
        self.collate, self.vision, self.tokenizer = collate, vision, tokenizer
        self.extra, self.shares_prefix, self.segments, self.reference = extra, shares_prefix, segments, reference
        self.count_image_tokens = count_image_tokens
        self.caches_image_pair = False  # `ImagePairCollator` sets it
        self.images_once: ImagesOnce | None = None
        self._image_tokens = image_tokens(collate.processor) if vision else ()
        if vision and (shares_prefix or extra):
            self.images_once = collate.processor = ImagesOnce(collate.processor)

    def __call__(self, rows: list[Row]) -> PreferenceBatch:
        """The batch of `rows`, which are not changed."""
        given, rows = rows, [self.loaded(row, index) for index, row in enumerate(rows)]
        # TRL's collators edit their rows, hence the copies.
        batch = self._collated([dict(pair) for pair in self._pairs(rows)], len(rows))
        if self.vision and self.count_image_tokens:
            self._check_images(batch, rows)
        self._check_replies(batch, rows)
        if self.extra:
            batch[NUM_REPLIES] = self.extra + 2
        if self.shares_prefix:
            prompts = batch["attention_mask"].sum(1) - batch["completion_mask"].sum(1)
            batch[SHARED_PREFIX] = torch.stack([torch.arange(len(prompts)) % len(rows), prompts], dim=1)
        if self.segments is not None:
            batch |= segments_of(batch, rows, self.segments, self.tokenizer)
        if self.reference is not None:
            batch[REFERENCE] = self._reference(batch, map(self.reference, given), rows)
        return cast(PreferenceBatch, batch)

    def loaded(self, row: Row, index: int = 0) -> Row:
        """The row with its name and its images decoded, as every later step sees it."""
        name = name_of(row, index, " of the batch")
        if not self.vision:
            return {**row, ROW_NAME: name}
        # Empty replies are found by their tokens: a pair source may return any text.
        check_row(row, "dpo", name=name, image_tokens=self._image_tokens, with_images=True, passes=(EMPTY_REPLY,))
        images = [
            load_image(image, name=f"{name}, image {number}") for number, image in enumerate(row_images(row, name))
        ]
        kept = {key: value for key, value in row.items() if key not in ("image", "images")}
        kept |= {column: _without_empty_keys(row[column]) for column in ("prompt", "chosen", "rejected")}
        if row.get("rejected_extra"):
            kept["rejected_extra"] = [_without_empty_keys(reply) for reply in row["rejected_extra"]]
        return kept | {"images": images, ROW_NAME: name}

    def _pairs(self, rows: list[Row]) -> list[Row]:
        """Each row once per rejected reply, the first rejected replies of all rows first."""
        column = "rejected_extra" if self.vision else "rejected_extra_ids"
        rejected = "rejected" if self.vision else "rejected_ids"
        for row in rows:
            if self.extra and len(row.get(column) or ()) != self.extra:
                raise RowError(
                    f"{row[ROW_NAME]}: `rejected_extra` holds {len(row.get(column) or ())} replies, and the first row "
                    f"of the dataset {self.extra}. Every row needs the same number; drop the others or fill them up."
                )
        return rows + [row | {rejected: row[column][number]} for number in range(self.extra) for row in rows]

    def _collated(self, pairs: list[Row], rows: int) -> dict[str, Any]:
        if self.images_once is not None:
            self.images_once.rows = rows
        batch = self.collate(pairs)
        if not self.extra:
            return batch
        shape = batch["input_ids"].shape
        # Chosen replies were collated once per pair; the first copy stays.
        keep = [*range(rows), *range(len(pairs), 2 * len(pairs))]
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.shape == shape:
                batch[name] = value[keep]
            elif isinstance(value, Tensor) and not self.shares_prefix:
                batch[name] = torch.cat([value] * (self.extra + 2))
        return batch

    def _check_images(self, batch: dict[str, Tensor], rows: list[Row]) -> None:
        copies = 1 if self.shares_prefix else self.extra + 2
        processor = self.images_once.processor if self.images_once is not None else self.collate.processor
        tokens = batch["input_ids"][: copies * len(rows)]
        images = [len(row["images"]) for row in rows] * copies
        names = [row[ROW_NAME] for row in rows] * copies
        with as_row_errors():
            check_image_tokens({**batch, "input_ids": tokens}, images, processor, names)

    def _check_replies(self, batch: dict[str, Tensor], rows: list[Row]) -> None:
        for sequence, tokens in enumerate(batch["completion_mask"].sum(1).tolist()):
            if tokens == 0:
                kind = "chosen" if sequence < len(rows) else "rejected"
                raise RowError(
                    f"{rows[sequence % len(rows)][ROW_NAME]}: the {kind} reply has no token left. It is empty, or "
                    "`max_length` cuts it off after the prompt. Drop the row (`bad_pairs='skip'` drops empty "
                    "replies), or raise `max_length`."
                )

    def _reference(self, batch: dict[str, Tensor], of_rows: Iterable[Sequence[Tensor]], rows: list[Row]) -> Tensor:
        """(K * P, T - 1), float32, 0 outside the replies; P more with the chosen ones under corrupted images."""
        is_reply = batch["completion_mask"][:, 1:].bool()
        if self.caches_image_pair:
            is_reply = torch.cat([is_reply, is_reply[: len(rows)]])
        result = torch.zeros(is_reply.shape)
        for row, values in enumerate(of_rows):
            for reply, log_probs in enumerate(values):
                sequence = reply * len(rows) + row
                if len(log_probs) != int(is_reply[sequence].sum()):
                    raise ValueError(
                        f"{rows[row][ROW_NAME]}: the reference cache holds {len(log_probs)} log-probabilities for a "
                        f"reply of {int(is_reply[sequence].sum())} tokens. The chat template or `max_length` changed; "
                        "delete the cache's folder."
                    )
                result[sequence, is_reply[sequence]] = log_probs
        return result


def _without_empty_keys(reply: Any) -> Any:
    return reply if isinstance(reply, str) else without_empty_keys(reply)
