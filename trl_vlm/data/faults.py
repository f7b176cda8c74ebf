"""What is wrong with one column of a row: messages, further replies, spans, facts, numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from trl_vlm.data.errors import RowError, RowTypeError
from trl_vlm.data.messages import ROLES, Conversation, content_parts, message_text

IMAGE_COLUMNS = ("images", "image")
REPLY_COLUMNS = ("chosen", "rejected", "completion")  # one reply each
MESSAGE_COLUMNS = ("prompt", *REPLY_COLUMNS)
SPAN_COLUMNS = ("chosen_spans", "rejected_spans")
SCORE_WEIGHT_COLUMNS = ("chosen_score_weight", "rejected_score_weight")
NUMBER_COLUMNS = ("length_weight", "margin", *SCORE_WEIGHT_COLUMNS)
COLUMNS = (*MESSAGE_COLUMNS, "rejected_extra", *SPAN_COLUMNS, "facts", *NUMBER_COLUMNS, "answer")

# Kinds of faults, to count them by.
MISSING = "missing"
WRONG_TYPE = "wrong type"
NO_MESSAGES = "no messages"
NOT_A_MESSAGE = "not a message"
NOT_A_PART = "not a part of a message"
EMPTY_REPLY = "the reply is empty"
EMPTY_QUESTION = "the last question is empty"
WRONG_SPEAKER = "the wrong speaker is last"
IMAGE_IN_REPLY = "an image in a reply"
IMAGE_IN_MESSAGE = "an image inside a message"
IMAGE_TOKEN = "an image token in the text"
CONTROL_TOKEN = "a control token in the text"
NOT_UNICODE = "text that is not Unicode"
SAME_REPLY = "the replies are the same"
BAD_SPAN = "a span outside the reply"
NOT_A_FACT = "not a fact"
NOT_A_NUMBER = "not a finite number"
NOT_AN_ANSWER = "not a gold answer"
TWO_IMAGE_COLUMNS = "two columns of images"
IMAGE_PLACES = "places and images differ"


MALFORMED = (MISSING, WRONG_TYPE, NO_MESSAGES, NOT_A_MESSAGE, NOT_A_PART)


class Fault(NamedTuple):
    """One thing that is wrong with a row.

    Args:
        column: Where.
        kind: What, in the same words for every row that has it.
        reason: What came, what was needed, what to do.
        is_warning: Trainers take the row; it is probably not what was meant.
    """

    column: str
    kind: str
    reason: str
    is_warning: bool = False

    def error(self, name: str) -> RowError:
        """The fault as an error, under the name of its row."""
        error = RowTypeError if self.kind == WRONG_TYPE else RowError
        where = name if self.column in IMAGE_COLUMNS else f"{name}, column {self.column!r}"
        return error(f"{where}: {self.reason}", self.kind)


class Reading(NamedTuple):
    """How messages are read: with images or as text alone, and which tokens their text must not contain."""

    with_images: bool
    image_tokens: tuple[str, ...] = ()
    control_tokens: tuple[str, ...] = ()


def column_faults(row: Mapping[str, Any], column: str, reading: Reading) -> Iterator[Fault]:
    """The faults of a column that is there."""
    value = row[column]
    if column in MESSAGE_COLUMNS:
        return _message_faults(value, column, reading)
    if column == "rejected_extra":
        return _extra_faults(value, reading)
    if column in SPAN_COLUMNS:
        return span_faults(row, column)
    if column == "facts":
        return _fact_faults(value, reading)
    return _number_faults(value, column) if column in NUMBER_COLUMNS else _answer_faults(value)


def _message_faults(messages: Any, column: str, reading: Reading) -> Iterator[Fault]:
    malformed = _form_fault(messages, column, reading.with_images)
    if malformed is not None:
        yield malformed
        return
    yield from _speaker_faults(messages, column, reading.with_images)
    for message in messages:
        yield from text_faults(message_text(message), column, f"the {message['role']}'s text", reading)
    if column in REPLY_COLUMNS and any(
        part.get("type") == "image" for part in content_parts([m for m in messages if m["role"] == "assistant"])
    ):
        yield Fault(column, IMAGE_IN_REPLY, "a part of the reply is an image. Replies are text: remove the part.")


def _form_fault(messages: object, column: str, with_images: bool) -> Fault | None:
    """Why a value is no list of messages."""
    if isinstance(messages, str) or not isinstance(messages, list | tuple):
        return Fault(
            column,
            WRONG_TYPE,
            f"it is a {type(messages).__name__}. It must be a list of messages, "
            'for example [{"role": "user", "content": "What is this?"}].',
        )
    if not messages:
        return Fault(column, NO_MESSAGES, "the list of messages is empty. It needs at least one message.")
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or (with_images and role not in ROLES):
            return Fault(
                column,
                NOT_A_MESSAGE,
                f"{_shown(message)} is not a message. It needs a 'role' ({', '.join(ROLES)}) and 'content'.",
            )
        fault = _content_fault(message, column, with_images)
        if fault is not None:
            return fault
    return None


def _content_fault(message: Mapping[str, Any], column: str, with_images: bool) -> Fault | None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return None
    if not isinstance(content, list | tuple):
        return Fault(
            column,
            WRONG_TYPE,
            f"the content of the {message['role']} turn is a {type(content).__name__}. "
            "It must be a string, or a list of parts such as {'type': 'text', 'text': ...}.",
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        is_text = kind == "text" and isinstance(part.get("text"), str)
        is_known = is_text or kind == "image" or (isinstance(kind, str) and kind != "text" and not with_images)
        if not is_known:
            return Fault(
                column,
                NOT_A_PART,
                f"{_shown(part)} in the content of the {message['role']} turn is not a part of a message. It must be "
                "{'type': 'text', 'text': ...} or {'type': 'image'}.",
            )
    return None


def _speaker_faults(messages: Conversation, column: str, with_images: bool) -> Iterator[Fault]:
    """Who speaks last, and whether they say anything."""
    last = messages[-1]
    text, role = message_text(last).strip(), last["role"]
    if column in REPLY_COLUMNS:
        if role != "assistant" and with_images:
            yield Fault(column, WRONG_SPEAKER, f"the reply is the {role}'s. Its last message must be the assistant's.")
        elif not text and not last.get("tool_calls"):
            yield Fault(column, EMPTY_REPLY, "the reply is empty. Drop the row, or fill the reply in.")
    elif role not in ("user", "tool"):
        # TRL lets the model go on with an assistant's turn, and knows nothing to do with a system's.
        reason = f"it ends on the {role}'s turn. A prompt ends on the user's, so that the assistant replies."
        yield Fault(column, WRONG_SPEAKER, reason, is_warning=role == "assistant" or not with_images)
    elif not text:
        reason = "the last question is empty. Fill it in, or drop the row."
        yield Fault(column, EMPTY_QUESTION, reason, is_warning=True)


def text_faults(text: str, column: str, what: str, reading: Reading) -> Iterator[Fault]:
    """Faults of a text: control tokens, image placeholders, lone surrogates."""
    for token in reading.image_tokens if reading.with_images else ():
        if token in text:
            yield Fault(
                column,
                IMAGE_TOKEN,
                f"{what} has a literal {token}, which is read as one more image. "
                "Remove it from the text: images of the `images` column are put at the first user turn.",
            )
    for token in reading.control_tokens:
        if token in text:
            yield Fault(
                column,
                CONTROL_TOKEN,
                f"{what} has a literal {token}, which tokenizers read as the end of a turn or the like, and which "
                "reward models are not shown. Remove it from the text.",
            )
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        reason = f"{what} holds half a character (a lone surrogate), which no tokenizer takes: {_shown(text)}. Fix it."
        yield Fault(column, NOT_UNICODE, reason)


def _extra_faults(extra: object, reading: Reading) -> Iterator[Fault]:
    """Faults of `rejected_extra`, a list of further rejected replies."""
    if not isinstance(extra, list | tuple):
        reason = f"it is a {type(extra).__name__}. It must be a list of replies, each a list of messages."
        yield Fault("rejected_extra", WRONG_TYPE, reason)
        return
    for number, reply in enumerate(extra):
        if reply is None:
            yield Fault(
                "rejected_extra", MISSING, f"reply {number}: it is None. Fill it in, or take it out of the list."
            )
            continue
        for fault in _message_faults(reply, "rejected", reading):
            yield fault._replace(column="rejected_extra", reason=f"reply {number}: {fault.reason}")


def span_faults(row: Mapping[str, Any], column: str) -> Iterator[Fault]:
    """Faults of spans, see `span_fault`."""
    try:
        reply = row[column.removesuffix("_spans")]
        length = len(reply if isinstance(reply, str) else message_text(reply[-1]))
        reasons = [span_fault(span, length) for span in row[column]]
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        reason = "it is not a list of (start, end) or (start, end, weight), in characters, beside a reply."
        yield Fault(column, WRONG_TYPE, reason)
        return
    for reason in reasons:
        if reason is not None:
            yield Fault(column, BAD_SPAN, reason)


def span_fault(span: Sequence[float], length: int) -> str | None:
    """What is wrong with a span of a reply of `length` characters: (start, end), end exclusive, perhaps a weight.

    Raises:
        TypeError: It is not two or three numbers.
        ValueError: Likewise.
    """
    start, end, *rest = span
    if len(rest) > 1 or not all(isinstance(value, Real) for value in span):
        raise TypeError(f"{span} is not (start, end) or (start, end, weight).")
    # Arrow keeps one type in a list: beside a weight, places come as floating-point numbers.
    shown = tuple(int(value) if float(value).is_integer() else value for value in (start, end))
    if not all(isinstance(value, int) for value in shown) or not 0 <= start < end <= length:
        return (
            f"the span {shown} is not inside the reply of {length} characters. A span is (start, end) or (start, end, "
            "weight), in whole characters, end exclusive."
        )
    if rest and not 0 <= rest[0] < math.inf:
        return f"the span {shown} has the weight {rest[0]}. It must be a number from 0 on; an unchanged token has 1."
    return None


def _fact_faults(facts: object, reading: Reading) -> Iterator[Fault]:
    if isinstance(facts, str) or not isinstance(facts, list | tuple):
        reason = f"it is a {type(facts).__name__}. It must be a list of strings."
        yield Fault("facts", WRONG_TYPE, reason)
        return
    # Control tokens are removed where a fact is shown, so here they are only a warning.
    tokens = (*reading.image_tokens, *reading.control_tokens) if reading.control_tokens else ()
    for fact in facts:
        if not isinstance(fact, str) or not fact.strip():
            reason = f"{_shown(fact)} is not a fact. Each one is a string that says something."
            yield Fault("facts", NOT_A_FACT, reason)
        else:
            yield from text_faults(fact, "facts", f"the fact {_shown(fact)}", Reading(True, (), tokens))


def _number_faults(value: object, column: str) -> Iterator[Fault]:
    if isinstance(value, bool) or not isinstance(value, Real):
        yield Fault(column, WRONG_TYPE, f"{_shown(value)} is not a number. Use 0.0 for none.")
    elif not math.isfinite(value):
        yield Fault(column, NOT_A_NUMBER, f"{value} is not a finite number. Use 0.0 for none.")
    elif column in SCORE_WEIGHT_COLUMNS and value < 0:
        reason = f"{value} is negative, and would turn the preference around. Use 0 or more; 1 changes nothing."
        yield Fault(column, NOT_A_NUMBER, reason)


def _answer_faults(value: object) -> Iterator[Fault]:
    if not isinstance(value, str) or not value.strip():
        yield Fault("answer", NOT_AN_ANSWER, f"{_shown(value)} is not a gold answer: a string, or None.")


def _shown(value: object) -> str:
    """A value for an error message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
