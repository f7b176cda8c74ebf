"""Judges that give scores: their requests, and strict and published parsers of their answers.

A strict parser gives a score only where the answer has the requested form; everything else is counted as unparsed. A
published parser does what the benchmark's own code does, so that numbers can be compared with papers.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from trl_vlm.evaluation.benchmark import Question, Record
    from trl_vlm.judges.chat import Answer, Chat, Request

_OPEN, _CLOSE = r"[*_`#>\s\[(\"']*", r"[*_`\s\])\"'.]*"
_RATING = re.compile(rf"{_OPEN}rating{_CLOSE}:{_OPEN}([0-6]){_CLOSE}", re.IGNORECASE | re.ASCII)
_TWO_NUMBERS = re.compile(r"\s*(\d+(?:\.\d+)?)[,\s]\s*(\d+(?:\.\d+)?)\s*", re.ASCII)
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
HIGHEST = 10  # of the two numbers


@dataclass(frozen=True)
class Judging:
    """How a judge is asked about a reply.

    Args:
        template: The words that every request has in common; its digest is stored with the numbers.
        request: The request for a record; None if the reply needs none.
        sees_images: Whether the judge is shown the images.
        parts: The requests that a request stands for, where several questions are asked about a reply; None: itself.
    """

    template: str
    request: "Callable[[Question, Record], Request | None]"
    sees_images: bool = False
    parts: "Callable[[Request], Sequence[Request]] | None" = None

    @property
    def digest(self) -> str:
        """A short digest of the template."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:12]

    def ask(self, chat: "Chat", requests: "Sequence[Request]") -> "list[Answer]":
        """A judge's answer to each request; to one in parts a JSON list, with null for parts without an answer."""
        if self.parts is None:
            return chat(requests)
        parts = [self.parts(request) for request in requests]
        answers = iter(chat([part for each in parts for part in each]))
        return [_joined([next(answers) for _ in each]) for each in parts]


class JudgeName(NamedTuple):
    """The identity of a judge. Results of judges that differ in any of these are never compared.

    Args:
        name: Folder, hub id, or name at an endpoint.
        revision: Commit of the weights, if known.
        template: Digest of the words of the request.
    """

    name: str
    revision: str
    template: str

    def __str__(self) -> str:
        return f"{self.name}{'@' + self.revision[:8] if self.revision else ''}, prompt {self.template}"

    @property
    def folder(self) -> str:
        """A folder name for the judge."""
        digest = hashlib.sha256(json.dumps(self).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', self.name)[-60:]}-{digest}"


def judge_name(chat: "Chat", judging: Judging) -> JudgeName:
    """The name of `chat`.

    Raises:
        TypeError: It has no attribute `name`.
    """
    model = getattr(chat, "model", None)
    config = getattr(model, "config", None)
    name = getattr(chat, "name", None) or (model if isinstance(model, str) else getattr(model, "name_or_path", None))
    if not name:
        raise TypeError(f"{chat!r} has no name, and results must say who judged. Set its attribute `name`.")
    return JudgeName(str(name), str(getattr(config, "_commit_hash", None) or ""), judging.digest)


def rating(answer: str | None) -> int | None:
    """The rating from 0 to 6 in an answer's last line ("Rating: 4"); None if it has another form, or there are two."""
    lines = [line for line in (answer or "").splitlines() if line.strip()]
    found = {match[1] for line in lines if (match := _RATING.fullmatch(line))}
    return int(found.pop()) if len(found) == 1 and _RATING.fullmatch(lines[-1]) else None


def published_rating(answer: str | None) -> int:
    """The rating as MMHal-Bench reads it: the one of "rating: 0" to "rating: 6" that occurs; 0 if not exactly one."""
    text = (answer or "").lower()
    found = [score for score in range(7) if f"rating: {score}" in text]
    return found[0] if len(found) == 1 else 0


def two_numbers(answer: str | None) -> tuple[float, float] | None:
    """The two numbers from 1 to 10 that an answer's first line consists of; None if it has another form."""
    match = _TWO_NUMBERS.fullmatch((answer or "").strip().split("\n")[0])
    if match is None:
        return None
    first, second = float(match[1]), float(match[2])
    return (first, second) if 1 <= first <= HIGHEST and 1 <= second <= HIGHEST else None


def published_two_numbers(answer: str | None) -> tuple[float, float]:
    """The two numbers as LLaVA-Bench reads them; (-1, -1), which its code averages in, where there are not two."""
    words = (answer or "").split("\n")[0].replace(",", " ").split()
    try:
        first, second = map(float, words)
    except ValueError:
        return -1.0, -1.0
    return first, second


def json_list(answer: str | None) -> list[str] | None:
    """The JSON list of strings that an answer, its fenced block or its last line is; None if it has another form."""
    text = (answer or "").strip()
    fenced = _FENCED.findall(text)
    candidates = [text, *(fenced if len(fenced) == 1 else []), text.split("\n")[-1]]
    return next((found for found in map(_strings, candidates) if found is not None), None)


def answers_in(answer: str | None, count: int) -> list[str | None]:
    """The answers to `count` parts of a request, see `Judging.ask`; None for each that is not there."""
    try:
        found: Any = json.loads(answer or "")
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, list) or len(found) != count:
        return [None] * count
    return [item if isinstance(item, str) else None for item in found]


def _joined(answers: "Sequence[Answer]") -> "Answer":
    """One answer of those to the parts of a request; none if no part has one."""
    if all(answer.text is None for answer in answers):
        return answers[0]
    return answers[0]._replace(text=json.dumps([answer.text for answer in answers], ensure_ascii=False), reason="")


def _strings(text: str) -> list[str] | None:
    try:
        found: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else None


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its slots `{name}` filled in one pass, so that a reply cannot fill a slot."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]] if match[1] in values else match[0], template)
