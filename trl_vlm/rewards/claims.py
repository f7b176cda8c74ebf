"""The claims of a reply, each checked against the image: who splits, who checks, and a reward that counts.

Source: RLAIF-V (arXiv:2405.17220), "divide and conquer".
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from trl_vlm.data.messages import reply_text
from trl_vlm.data.rows import ROW_NAME, Row
from trl_vlm.data.sentences import split_sentences
from trl_vlm.rewards.replies import required_ids
from trl_vlm.rewards.rows import judged_rows

_OPEN_END = "\ufffd"  # what a character decodes to of which only some bytes are there


class Claim(NamedTuple):
    """A statement that a reply makes.

    Attributes:
        text: As the checker reads it.
        end: Where the passage of the reply that makes it ends, in characters.
    """

    text: str
    end: int


class ReplyClaims(NamedTuple):
    """The claims of a reply, in order, or why they are not known.

    Attributes:
        claims: Empty where the reply states nothing.
        reason: Why the reply could not be split, in a few words that can be counted; "" where it could.
    """

    claims: Sequence[Claim]
    reason: str = ""


class ClaimQuestion(NamedTuple):
    """Is this true of the images of `row`?"""

    row: Row
    text: str


class ClaimVerdict(NamedTuple):
    """What a checker says of a claim.

    Attributes:
        is_true: None for no decision.
        reason: Why there is none, in a few words that can be counted; "" where there is one.
    """

    is_true: bool | None
    reason: str = ""


class ClaimChecker(Protocol):
    """Says of claims whether they are true."""

    def check(self, questions: Sequence[ClaimQuestion]) -> list[ClaimVerdict]:
        """One verdict per claim; a checker that cannot decide says so and never guesses."""
        ...


class ClaimSplitter(Protocol):
    """Splits replies into claims."""

    def __call__(self, rows: Sequence[Row], replies: Sequence[str]) -> list[ReplyClaims]:
        """The claims of each reply to its row."""
        ...


class CheckedReply(NamedTuple):
    """A reply's claims and the verdicts on them.

    Attributes:
        claims: Its claims.
        verdicts: One for each.
        reason: Why the reply could not be split; "" where it could.
    """

    claims: Sequence[Claim]
    verdicts: Sequence[ClaimVerdict]
    reason: str = ""

    @property
    def wrong(self) -> int:
        """Claims that are not true."""
        return sum(verdict.is_true is False for verdict in self.verdicts)

    @property
    def undecided(self) -> int:
        """Claims without a verdict."""
        return sum(verdict.is_true is None for verdict in self.verdicts)


def sentence_claims(rows: Sequence[Row], replies: Sequence[str]) -> list[ReplyClaims]:
    """Each sentence of a reply as a claim; questions, and sentences without a letter or digit, claim nothing."""
    return [ReplyClaims(_sentences(reply)) for reply in replies]


def sentences_with_ends(reply: str) -> list[Claim]:
    """The sentences of a reply, without the white space around them."""
    found, start = [], 0
    for sentence in split_sentences(reply):
        start += len(sentence)
        if text := sentence.strip():
            found.append(Claim(text, start - len(sentence) + len(sentence.rstrip())))
    return found


def _sentences(reply: str) -> list[Claim]:
    return [
        claim
        for claim in sentences_with_ends(reply)
        if any(character.isalnum() for character in claim.text) and claim.text[-1] not in "?？"
    ]


def checked_replies(
    rows: Sequence[Row], replies: Sequence[str], checker: ClaimChecker, splitter: ClaimSplitter = sentence_claims
) -> list[CheckedReply]:
    """The verdicts on all claims of replies. A claim that a row's replies make several times is asked about once.

    Args:
        rows: What each reply answers; replies to one row may pass the same object.
        replies: Their texts.
        checker: Checks the claims.
        splitter: Finds them.

    Raises:
        ValueError: The splitter or the checker returned another number of results than it got.
    """
    split = splitter(rows, replies)
    _check_count("splitter", splitter, len(split), len(replies), "replies")
    places: dict[tuple[int, str], int] = {}
    questions: list[ClaimQuestion] = []
    for row, (claims, _) in zip(rows, split, strict=True):
        for claim in claims:
            if places.setdefault((id(row), claim.text), len(questions)) == len(questions):
                questions.append(ClaimQuestion(row, claim.text))
    verdicts = checker.check(questions) if questions else []
    _check_count("checker", checker, len(verdicts), len(questions), "claims")
    return [
        CheckedReply(claims, [verdicts[places[id(row), claim.text]] for claim in claims], reason)
        for row, (claims, reason) in zip(rows, split, strict=True)
    ]


def _check_count(role: str, part: object, found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise ValueError(f"the {role} {part!r} returned {found} results for {wanted} {what}. Return one for each.")


@dataclass(frozen=True)
class ClaimReward:
    """A TRL reward function: what a reply's claims are worth; by default minus the number of wrong ones.

    A reply that states nothing has no wrong claim and gets 0, the most by default: give `right` a value, or add a
    reward for help, or silence is what is learned.

    A reply is worth the sum over its claims. Where `undecided` is None, claims without a verdict count nowhere, and a
    reply without any decided claim, or one that could not be split, has no reward (None): GRPO and RLOO leave it
    out, PPO refuses it.

    Args:
        checker: Checks the claims.
        splitter: Finds them; by default they are the sentences.
        right: What a true claim is worth.
        wrong: What an untrue one is worth.
        undecided: What a claim without a verdict is worth, and a reply that could not be split; None: see above.
        share: The mean over the claims that count in place of the sum.
        at_claim_ends: The policy's tokenizer. With it, each reply gets a list with one reward for each of its tokens:
            what a claim is worth lies on the last token of its passage. For `PPOTrainer`; other trainers need the sum.

    Source: RLAIF-V (arXiv:2405.17220) for the number of wrong claims; FGAIF (arXiv:2404.05046) for rewards within a
    reply.
    """

    checker: ClaimChecker
    splitter: ClaimSplitter = sentence_claims
    _: KW_ONLY
    right: float = 0.0
    wrong: float = -1.0
    undecided: float | None = None
    share: bool = False
    at_claim_ends: PreTrainedTokenizerBase | None = None

    __name__: ClassVar[str] = "claims"

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: Sequence[Sequence[int]] | None = None,
        images: Sequence | None = None,
        image: Sequence | None = None,
        row_name: Sequence[str] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[Any]:
        """A number for each reply, or with `at_claim_ends` a list of numbers; None where there is no reward."""
        judged = judged_rows(prompts, completions, images=images, image=image, row_name=row_name)
        rows = [
            {**_row(columns, place, len(judged)), "prompt": row.prompt, "images": row.images, ROW_NAME: row.name}
            for place, row in enumerate(judged)
        ]
        replies = [reply_text(row.completion) for row in judged]
        checked = checked_replies(rows, replies, self.checker, self.splitter)
        if log_metric is not None:
            for name, value in claim_means(checked).items():
                log_metric(f"{self.__name__}/{name}", value)
        worth = [self._worth(reply) for reply in checked]
        if self.at_claim_ends is None:
            return [None if values is None else float(sum(values)) for values in worth]
        ids = required_ids(completion_ids, self.__name__, len(replies))
        return [
            None if values is None else self._on_tokens(row.name, reply, claims, values, tokens)
            for row, reply, claims, values, tokens in zip(judged, replies, checked, worth, ids, strict=True)
        ]

    def _worth(self, reply: CheckedReply) -> list[float] | None:
        """What each claim is worth; of a reply that could not be split, one value; None: no reward."""
        if reply.reason:
            return None if self.undecided is None else [self.undecided]
        values = [self._value(verdict) for verdict in reply.verdicts]
        counting = sum(value is not None for value in values)
        if values and not counting:
            return None
        return [(value or 0.0) / (counting if self.share else 1) for value in values]

    def _value(self, verdict: ClaimVerdict) -> float | None:
        if verdict.is_true is None:
            return self.undecided
        return self.right if verdict.is_true else self.wrong

    def _on_tokens(
        self, name: str, reply: str, checked: CheckedReply, values: Sequence[float], ids: Sequence[int]
    ) -> list[float]:
        assert self.at_claim_ends is not None
        ends = [len(reply)] if checked.reason else [claim.end for claim in checked.claims]
        places = last_tokens(self.at_claim_ends, ids, reply, ends)
        if places is None:
            raise ValueError(
                f"{name}: the reply {reply[:60]!r} is not the text of its {len(ids)} tokens, as with tools, so no "
                "token ends a claim. Leave `at_claim_ends` out."
            )
        rewards = [0.0] * len(ids)
        for place, value in zip(places, values, strict=True):
            rewards[place] += value
        return rewards


def last_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], reply: str, ends: Sequence[int]
) -> list[int] | None:
    """The token with which each passage of a reply ends; None if the reply is not in their text.

    Args:
        tokenizer: The policy's.
        ids: The reply's tokens, T of them.
        reply: Its text.
        ends: Where the passages end, in characters of the reply.

    Returns:
        One index for each end, in [0, T).
    """

    def characters(count: int) -> int:
        text = tokenizer.decode(list(ids[:count]), skip_special_tokens=True)
        assert isinstance(text, str)  # of one sequence
        return len(text.rstrip(_OPEN_END))

    whole = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(whole, str)
    start = whole.find(reply)
    if start < 0 or (ends and not ids):
        return None
    counts = range(1, len(ids) + 1)
    return [min(bisect_left(counts, start + end, key=characters), len(ids) - 1) for end in ends]


def claim_means(replies: Sequence[CheckedReply]) -> dict[str, float]:
    """Claims per reply, wrong ones per reply, the share of undecided ones, and of replies that could not be split."""
    claims = sum(len(reply.claims) for reply in replies)
    count = max(1, len(replies))
    return {
        "per_reply": claims / count,
        "wrong": sum(reply.wrong for reply in replies) / count,
        "undecided": sum(reply.undecided for reply in replies) / max(1, claims),
        "not_split": sum(bool(reply.reason) for reply in replies) / count,
    }


def _row(columns: Mapping[str, Any], place: int, count: int) -> dict[str, Any]:
    """The columns of a row, of what TRL passes to a reward function."""
    return {name: values[place] for name, values in columns.items() if _is_column(values, count)}


def _is_column(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count
