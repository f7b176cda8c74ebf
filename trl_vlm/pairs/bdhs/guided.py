"""A reference reply as sentences that are cut at a word, to be finished by a model and put together again."""

import re
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from trl_vlm.models.continuation.continuations import Job
from trl_vlm.pairs.bdhs.sentences import first_sentence, maybe_swapped, pivots, sentence_end, split_sentences
from trl_vlm.pairs.draws import Draws
from trl_vlm.pairs.reply_tokens import ReplyTokens, added_text


class Cut(NamedTuple):
    """One sentence of a reference, cut.

    job: What the model continues: the true sentences before this one, and its prefix.
    context: The tokens of the reply that the job keeps, forced ones included.
    prefix: What is kept of the sentence.
    separator: White space between it and the next one.
    seed: Of the tokens that finish it.
    """

    job: Job
    context: list[int]
    prefix: str
    separator: str
    seed: int

    def text(self, tokenizer: PreTrainedTokenizerBase, new: Sequence[int]) -> str:
        """Returns the prefix with `new` tokens behind it."""
        return (self.prefix + added_text(tokenizer, self.context, new)).lstrip()

    def is_over(self, tokenizer: PreTrainedTokenizerBase, new: Sequence[int]) -> bool:
        """Whether the sentence has certainly come to its end."""
        return sentence_end(self.text(tokenizer, new), is_complete=False) is not None


def sentence_cuts(
    tokens: ReplyTokens, tokenizer: PreTrainedTokenizerBase, draws: Draws, *, row: int, iteration: int
) -> list[Cut]:
    """Returns every sentence of a reply with its beginning swapped from yes to no, or not, and cut at a random word.

    Cuts lie at the end of a word that is also the end of a token, so that what is kept of the reply are its own
    tokens; at least one word is kept, and at least one goes. A sentence of one word is written anew, and so is one in
    which no word ends with a token.

    Args:
        tokens: Of the reference reply.
        tokenizer: Of the model.
        draws: Of the row.
        row: The row's place in the batch.
        iteration: Another iteration, other draws.

    Source: arXiv:2407.02477, eq. 7 and Algorithm 1.
    """
    found: list[Cut] = []
    start = before = 0  # where the sentence begins, and where the one before it ended
    for place, piece in enumerate(split_sentences(tokens.text)):
        sentence = piece.rstrip()
        random = draws.random("cut", iteration, place)
        changed = maybe_swapped(sentence, random)
        if changed == sentence:
            kept, prefix, forced = _cut_of(tokens, tokenizer, sentence, start, before, random)
        else:
            # Never before the swapped word, or the swap would be lost.
            prefix = changed[: random.choice(pivots(changed) or [_first_word_end(changed)])]
            kept, forced = _written_anew(tokens, tokenizer, start, before, prefix)
        found.append(
            Cut(
                Job(row, kept, forced),
                tokens.ids[:kept] + forced,
                prefix,
                piece[len(sentence) :],
                draws.seed_of("tokens", iteration, place),
            )
        )
        start, before = start + len(piece), start + len(sentence)
    return found


def joined(cuts: Sequence[Cut], news: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the reply whose sentences are the cut ones with `news` behind them, each up to its end."""
    sentences = [first_sentence(cut.text(tokenizer, new)) for cut, new in zip(cuts, news, strict=True)]
    return "".join(sentence + cut.separator for sentence, cut in zip(sentences, cuts, strict=True) if sentence).strip()


def _cut_of(
    tokens: ReplyTokens, tokenizer: PreTrainedTokenizerBase, sentence: str, start: int, before: int, random: Random
) -> tuple[int, str, list[int]]:
    """How many tokens of the reply are kept, what of the sentence, and what is forced behind them."""
    cuts = {pivot: tokens.cut_at(start + pivot) for pivot in pivots(sentence)}
    aligned = [pivot for pivot, cut in cuts.items() if cut is not None]
    if not aligned:
        kept, forced = _written_anew(tokens, tokenizer, start, before, "")
        return kept, "", forced
    pivot = random.choice(aligned)
    return cuts[pivot], sentence[:pivot], []


def _first_word_end(sentence: str) -> int:
    return re.match(r"\s*\w*", sentence).end()


def _written_anew(
    tokens: ReplyTokens, tokenizer: PreTrainedTokenizerBase, start: int, before: int, prefix: str
) -> tuple[int, list[int]]:
    """How many tokens are kept before a sentence, and which ones then spell `prefix`, with the space before it."""
    kept = tokens.cut_at(before)
    if kept is None:  # a token spells the end of one sentence and the space behind it
        kept = sum(end <= start for end in tokens.ends)
    reached = max(0, tokens.ends[kept - 1]) if kept else 0
    missing = tokens.text[reached:start] + prefix if prefix else tokens.text[reached:before]
    return kept, tokens.ids_behind(tokenizer, reached, missing) if missing else []
