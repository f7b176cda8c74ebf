"""Replies of a model behind an OpenAI-compatible endpoint to the questions of a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass

from trl_vlm.evaluation.benchmark import Question
from trl_vlm.evaluation.subjects import Subject
from trl_vlm.evaluation.tasks import Task
from trl_vlm.judges.chat import CUT_OFF, Request
from trl_vlm.judges.endpoint import EndpointChat
from trl_vlm.judges.spending import Spending

PROBE = 'Write the word "ready" and nothing else.'


@dataclass(frozen=True)
class ServedReply:
    """A reply of an endpoint.

    Args:
        text: The reply; None if there is none.
        is_finished: Whether it ended by itself.
        reason: Why there is no reply.
    """

    text: str | None
    is_finished: bool = True
    reason: str = ""


@dataclass(frozen=True)
class EndpointSettings:
    """How an evaluated model behind an endpoint is asked. Greedy decoding, no cache: replies are saved anyway.

    Args:
        key_variable: Environment variable that holds the key; None sends none.
        tokens_field: What the endpoint calls the limit of a reply's length.
        concurrency: Requests at once; also how many replies are saved at a time.
        timeout_seconds: For one attempt.
        retries: Attempts after the first.
        max_requests: Requests that each process may send, repeated ones included; None sets no limit.
        image_side: Longer side of an image as it is sent, in pixels, at most.
    """

    key_variable: str | None = None
    tokens_field: str = "max_tokens"
    concurrency: int = 8
    timeout_seconds: float = 120.0
    retries: int = 6
    max_requests: int | None = 10_000
    image_side: int = 1536


class ServedModel:
    """An evaluated model behind an endpoint.

    Args:
        subject: Its address and name.
        settings: How it is asked.

    Raises:
        ValueError: The address or the variable of the key cannot be used.
    """

    def __init__(self, subject: Subject, settings: EndpointSettings):
        self._tokens_field = settings.tokens_field
        address, name = subject.endpoint
        self._chat = EndpointChat(
            address,
            name,
            key_variable=settings.key_variable,
            max_tokens=None,  # the benchmark's limit is set with each call
            concurrency=settings.concurrency,
            timeout_seconds=settings.timeout_seconds,
            retries=settings.retries,
            max_requests=settings.max_requests,
            image_side=settings.image_side,
            whole_only=False,
        )

    @property
    def served(self) -> list[str]:
        """What the endpoint called the model that answered."""
        return sorted(self._chat.served)

    @property
    def spending(self) -> Spending:
        """Requests and tokens so far."""
        return self._chat.spending

    def probe(self) -> None:
        """Asks once.

        Raises:
            ConnectionError: There is no answer.
        """
        self._chat.settings["extra_body"] = {self._tokens_field: 16}
        self._chat([Request(PROBE, (), "the first request")])

    def replies(self, task: Task, questions: Sequence[Question]) -> list[ServedReply]:
        """Greedy replies to the questions.

        Raises:
            ConnectionError: No question got a reply.
            SpendingCapReached: `max_requests` is used up.
        """
        self._chat.settings["extra_body"] = {self._tokens_field: task.max_new_tokens}
        requests = [
            Request(task.prompt(question), question.images, f"{task.benchmark.name}, question {question.id}")
            for question in questions
        ]
        return [ServedReply(text, reason != CUT_OFF, reason) for text, reason in self._chat(requests)]
