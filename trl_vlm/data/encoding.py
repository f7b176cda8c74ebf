"""From rows to batches. Nothing here cuts a sequence: a row that is too long is an error that names it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from trl_vlm.data.errors import RowError, as_row_errors
from trl_vlm.data.facts import JudgeTemplate, judge_messages, shuffled_facts
from trl_vlm.data.images import MAX_IMAGE_PIXELS, load_image
from trl_vlm.data.messages import Conversation, without_empty_keys
from trl_vlm.data.rows import Row, check_row, name_of, row_images
from trl_vlm.models.image_tokens import check_image_tokens, image_tokens
from trl_vlm.models.processors import control_tokens


def encode(
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    images: Sequence[Sequence[object]],
    *,
    continue_final_message: bool = False,
    add_generation_prompt: bool = False,
    max_length: int | None = None,
    names: Sequence[str] | None = None,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
    max_pixels: int | None = MAX_IMAGE_PIXELS,
    count_image_tokens: bool = True,
) -> dict[str, Tensor]:
    """The batch that a model of any family reads: token ids, attention mask, pixels and what belongs to them.

    Placeholders for the images are put before the text of the first user turn, unless the messages already hold them.
    The beginning-of-sequence token appears once, whether it comes from the chat template or from the tokenizer.

    Args:
        processor: The model's processor, as `models.processors.load_processor` returns it.
        conversations: B lists of messages; not modified.
        images: B lists of images, in any form that `load_image` reads; [] for a row without.
        continue_final_message: End with the last message as it is, without closing its turn.
        add_generation_prompt: End with the opening of an assistant turn.
        max_length: A longer row is an error; None allows any length.
        names: B, what errors call the rows.
        padding_side: "right" or "left".
        pad_to_multiple_of: Round the padded length up to a multiple of this.
        max_pixels: Largest image in pixels, width times height.
        count_image_tokens: Check that rows have as many placeholders as their images have features.

    Returns:
        A dictionary of tensors, `input_ids` and `attention_mask` (B, T) among them. No pixels if no row has an
        image.

    Raises:
        RowError: Images and placeholders do not match, a row is longer than `max_length`, or an image is bad.
    """
    names = list(names) if names is not None else [f"row {index} of the batch" for index in range(len(conversations))]
    images = [
        [load_image(image, name=f"{name}, image {place}", max_pixels=max_pixels) for place, image in enumerate(row)]
        for row, name in zip(images, names, strict=True)
    ]
    texts = processor.apply_chat_template(
        [
            _with_placeholders(conversation, len(row), name)
            for conversation, row, name in zip(conversations, images, names, strict=True)
        ],
        tokenize=False,
        continue_final_message=continue_final_message,
        add_generation_prompt=add_generation_prompt,
    )
    settings = {
        "add_special_tokens": _needs_bos(processor, texts),
        "padding": True,
        "padding_side": padding_side,
        "return_tensors": "pt",
    }
    if pad_to_multiple_of is not None:
        settings["pad_to_multiple_of"] = pad_to_multiple_of
    batch = _processed(processor, texts, images, names, settings)
    _check_lengths(batch["attention_mask"], max_length, names)
    if not count_image_tokens:
        return batch
    with as_row_errors():
        check_image_tokens(batch, [len(row) for row in images], processor, names)
    return batch


def prompt_batches(
    processor: ProcessorMixin, rows: Sequence[Row], *, batch_size: int, names: Sequence[str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The prompts of rows as `models.generation.generated` takes them, `batch_size` at a time.

    Rows are read when their batch is made, so a dataset may decode its images then.

    Args:
        processor: The model's processor.
        rows: Rows with `prompt` and, if they have any, `images` (or `image`).
        batch_size: Rows per batch.
        names: What errors call the rows; by default their own names, or their numbers.

    Raises:
        RowError: A row's image is broken or does not match its placeholders; the error names the row.
    """
    for start in range(0, len(rows), batch_size):
        places = range(start, min(start + batch_size, len(rows)))
        chunk = [rows[place] for place in places]
        called = [
            names[place] if names is not None else name_of(row, place)
            for place, row in zip(places, chunk, strict=True)
        ]
        yield encode(
            processor,
            [row["prompt"] for row in chunk],
            [row_images(row, name) for row, name in zip(chunk, called, strict=True)],
            add_generation_prompt=True,
            padding_side="left",
            names=called,
        )


def prompt_ids(
    processor: ProcessorMixin, conversation: Conversation, images: Sequence[object], name: str
) -> list[int]:
    """The token ids of one prompt, image tokens included, ending with the opening of the assistant's turn.

    Args:
        processor: The model's processor.
        conversation: The prompt.
        images: Its images, loaded.
        name: What errors call the row.

    Raises:
        RowError: Images and placeholders do not match.
    """
    batch = encode(processor, [conversation], [images], add_generation_prompt=True, names=[name], max_pixels=None)
    return batch["input_ids"][0].tolist()


@dataclass
class RewardCollator:
    """Turns P preference rows into the 2P sequences that a reward model scores: chosen rows, then rejected rows.

    Each sequence is prompt, reply and judge turn. Both candidates of a pair read the facts in one order, drawn from
    `seed`.

    The batch holds, beside what `encode` returns:
        margin: (P,), how much more the chosen reply must score; 0 for rows without. It comes first, so that
            `Trainer` counts pairs.

    Raises:
        RowError: A row breaks the row contract, or is longer than `max_length`.

    Example:
        >>> collator = RewardCollator(processor, JudgeTemplate())
        >>> row = {"images": [image], "prompt": [...], "chosen": [...], "rejected": [...], "facts": ["a cup"]}
        >>> batch = collator([row])
        >>> batch["input_ids"].shape, batch["margin"].shape
        (torch.Size([2, 187]), torch.Size([1]))
    """

    processor: ProcessorMixin
    template: JudgeTemplate = field(default_factory=JudgeTemplate)
    seed: int = 0
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    max_pixels: int | None = MAX_IMAGE_PIXELS
    count_image_tokens: bool = True

    def __post_init__(self) -> None:
        """Looks up the control tokens that a text must not contain."""
        self._image_tokens = image_tokens(self.processor)
        self._control_tokens = control_tokens(self.processor)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch of `rows`, which are not modified."""
        pairs = [self._pair(row, place) for place, row in enumerate(rows)]
        names = [f"{name} ({side})" for side in ("chosen", "rejected") for name, *_ in pairs]
        margins = [row["margin"] if row.get("margin") is not None else 0.0 for row in rows]
        batch = encode(
            self.processor,
            [chosen for *_, chosen, _ in pairs] + [rejected for *_, rejected in pairs],
            [images for _, images, *_ in pairs] * 2,
            continue_final_message=bool(self.template.opening),
            max_length=self.max_length,
            names=names,
            pad_to_multiple_of=self.pad_to_multiple_of,
            max_pixels=self.max_pixels,
            count_image_tokens=self.count_image_tokens,
        )
        return {"margin": torch.tensor(margins, dtype=torch.float), **batch}

    def tokens(self, row: Row) -> int:
        """The length of the longer candidate of a row in tokens, image tokens included."""
        unlimited = replace(self, max_length=None)
        return int(unlimited([row])["attention_mask"].sum(-1).max())

    def _pair(self, row: Row, place: int) -> tuple[str, Sequence[object], Conversation, Conversation]:
        """Name, decoded images, chosen and rejected conversation of a row."""
        name = name_of(row, place, " of the batch")
        check_row(row, "reward", name=name, image_tokens=self._image_tokens, with_images=True)
        images = [
            load_image(image, name=f"{name}, image {index}", max_pixels=self.max_pixels)
            for index, image in enumerate(row_images(row, name))
        ]
        # Drawn once, so that the order says nothing about which candidate is better.
        facts = shuffled_facts(row.get("facts"), self.seed)
        prompt = row.get("prompt") or []
        chosen, rejected = (
            judge_messages(prompt, row[side], facts, self.template, control_tokens=self._control_tokens)
            for side in ("chosen", "rejected")
        )
        return name, images, chosen, rejected


def _with_placeholders(conversation: Conversation, images: int, name: str) -> list[dict[str, Any]]:
    """The conversation in parts, with one placeholder per image."""
    try:
        return prepare_multimodal_messages(without_empty_keys(conversation), [None] * images)
    except ValueError as error:
        raise RowError(
            f"{name}: {error} Give as many images as the messages hold {{'type': 'image'}} parts; plain string "
            "content needs none, but it needs a user turn to put the images into."
        ) from error


def _needs_bos(processor: ProcessorMixin, texts: Sequence[str]) -> bool:
    """Whether the tokenizer has to add its special tokens: it would add only <bos>, and no text has it yet."""
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    return bos is not None and tokenizer("").input_ids == [tokenizer.bos_token_id] and not texts[0].startswith(bos)


def _processed(
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[Sequence[Image]],
    names: Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The processor's output for a batch; if it fails, the error names the row."""
    # Processors disagree about a batch in which no row has an image; without the argument they all take it.
    pixels = {"images": images} if any(images) else {}
    try:
        return dict(processor(text=list(texts), **pixels, **settings))
    except (ValueError, IndexError, StopIteration) as error:
        if len(texts) > 1:
            for text, row, name in zip(texts, images, names, strict=True):
                _processed(processor, [text], [row], [name], settings)
        raise RowError(
            f"{', '.join(names)}: the processor refuses {'it' if len(names) == 1 else 'them together'} ({error}). "
            "A text that contains the image token counts as an image: take it out of the messages, or give the row "
            "as many images as they name."
        ) from error


def _check_lengths(attention_mask: Tensor, max_length: int | None, names: Sequence[str]) -> None:
    if max_length is None:
        return
    lengths = attention_mask.sum(-1)
    for length, name in zip(lengths.tolist(), names, strict=True):
        if length > max_length:
            raise RowError(
                f"{name}: it has {length} tokens, image tokens included, and `max_length` is {max_length}. "
                "Nothing is cut off here, since that would lose image tokens or the judge turn. Set `max_length` to "
                f"at least {length} (or None), use smaller images, or drop such rows (`drop_too_long_rows=True` in "
                "reward training)."
            )
