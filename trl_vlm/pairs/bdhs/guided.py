"""A reference reply as sentences that are cut at a word, completed by a model and joined again."""

import re
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from trl_vlm.data.sentences import first_sentence, maybe_swapped, pivots, sentence_end, split_sentences
from trl_vlm.models.continuation.continuations import Continuation
from trl_vlm.pairs.draws import Draws
from trl_vlm.pairs.reply_tokens import ReplyTokens, added_text


class CutSentence(NamedTuple):
    """One sentence of a reference, cut at a word.

    continuation: What the model continues: the true sentences before this one, and its prefix.
    context: The tokens of the reply that the continuation keeps, forced ones included.
    prefix: What is kept of the sentence.
    separator: White space between it and the next one.
    seed: Of the tokens that complete it.
    """

    continuation: Continuation
    context: list[int]
    prefix: str
    separator: str
    seed: int

    def text(self, tokenizer: PreTrainedTokenizerBase, new: Sequence[int]) -> str:
        """The prefix followed by the `new` tokens."""
        return (self.prefix + added_text(tokenizer, self.context, new)).lstrip()

    def is_over(self, tokenizer: PreTrainedTokenizerBase, new: Sequence[int]) -> bool:
        """Whether the sentence has certainly ended."""
        return sentence_end(self.text(tokenizer, new), is_complete=False) is not None


def cut_sentences(
    tokens: ReplyTokens, tokenizer: PreTrainedTokenizerBase, draws: Draws, *, row: int, iteration: int
) -> list[CutSentence]:
    """Every sentence of a reply, cut at a random word, with a yes or no at its beginning swapped by chance.

    Cuts are at the end of a word that is also the end of a token, so that the kept part consists of the reply's own
    tokens; at least one word is kept, and at least one is dropped. A sentence of one word is regenerated, and so is
    one in which no word ends with a token.

    Args:
        tokens: Of the reference reply.
        tokenizer: Of the model.
        draws: Of the row.
        row: The row's index in the batch.
        iteration: Number of the iteration; each has its own draws.

    Source: arXiv:2407.02477, eq. 7 and Algorithm 1.
    """
    sentences: list[CutSentence] = []
    start = before = 0  # where the sentence begins, and where the one before it ended
    for index, piece in enumerate(split_sentences(tokens.text)):
        sentence = piece.rstrip()
        random = draws.random("cut", iteration, index)
        changed = maybe_swapped(sentence, random)
        if changed == sentence:
            kept, prefix, forced = _prefix_of(tokens, tokenizer, sentence, start, before, random)
        else:
            # Never before the swapped word, or the swap would be lost.
            prefix = changed[: random.choice(pivots(changed) or [_first_word_end(changed)])]
            kept, forced = _forced_prefix(tokens, tokenizer, start, before, prefix)
        sentences.append(
            CutSentence(
                Continuation(row, kept, forced),
                tokens.ids[:kept] + forced,
                prefix,
                piece[len(sentence) :],
                draws.seed_of("tokens", iteration, index),
            )
        )
        start, before = start + len(piece), start + len(sentence)
    return sentences


def joined(
    sentences: Sequence[CutSentence], completions: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> str:
    """The reply of the cut sentences with their `completions`, each up to its end."""
    texts = [
        first_sentence(sentence.text(tokenizer, new)) for sentence, new in zip(sentences, completions, strict=True)
    ]
    return "".join(text + sentence.separator for text, sentence in zip(texts, sentences, strict=True) if text).strip()


def _prefix_of(
    tokens: ReplyTokens, tokenizer: PreTrainedTokenizerBase, sentence: str, start: int, before: int, random: Random
) -> tuple[int, str, list[int]]:
    """How many tokens of the reply are kept, the kept part of the sentence, and the tokens forced after them."""
    # A pivot is a character; only those count at which a token of the reply ends too.
    counts = {pivot: tokens.tokens_before(start + pivot) for pivot in pivots(sentence)}
    aligned = {pivot: count for pivot, count in counts.items() if count is not None}
    if not aligned:
        kept, forced = _forced_prefix(tokens, tokenizer, start, before, "")
        return kept, "", forced
    pivot = random.choice(list(aligned))
    return aligned[pivot], sentence[:pivot], []


def _first_word_end(sentence: str) -> int:
    found = re.match(r"\s*\w*", sentence)
    return found.end() if found else 0


def _forced_prefix(
    tokens: ReplyTokens, tokenizer: PreTrainedTokenizerBase, start: int, before: int, prefix: str
) -> tuple[int, list[int]]:
    """How many tokens are kept before a sentence, and which ones then spell `prefix`, with the space before it."""
    kept = tokens.tokens_before(before)
    if kept is None:  # a token holds the end of one sentence and the space after it
        kept = sum(end <= start for end in tokens.ends)
    reached = max(0, tokens.ends[kept - 1]) if kept else 0
    missing = tokens.text[reached:start] + prefix if prefix else tokens.text[reached:before]
    return kept, tokens.ids_behind(tokenizer, reached, missing) if missing else []
