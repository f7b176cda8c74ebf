"""A reward model behind an address as a TRL reward function; `trl-vlm serve-reward` is the other side."""

import http.client
import json
import logging
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, NamedTuple, NoReturn

from trl_vlm.data.errors import RowError
from trl_vlm.data.io.http import (
    BodyTooLarge,
    JSONServer,
    Response,
    check_server_address,
    is_passing,
    key_in,
    retry_after_seconds,
)
from trl_vlm.data.messages import Conversation
from trl_vlm.rewards.rows import JudgedRow, judged_rows
from trl_vlm.rewards.wire import image_uri, request_body, row_as_json

logger = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 30.0  # between two attempts
HEALTH_SECONDS = 30.0
NO_ROOM = 507  # the server's GPU is full: the same rows would not fit the next time either


@dataclass
class _Batch:
    """Rows of one request: their names, the rows as JSON, and the place of each image among the request's."""

    names: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def size_with(self, uris: Sequence[str]) -> int:
        """The size with further images, roughly."""
        return self.size + sum(len(uri) for uri in set(uris) - self.images.keys())

    def add(self, row: JudgedRow, uris: Sequence[str]) -> None:
        """Adds a row whose images are these data URIs; equal ones are sent once."""
        self.size = self.size_with(uris)
        text = row_as_json(row, [self.images.setdefault(uri, len(self.images)) for uri in uris])
        self.size += len(text)
        self.names.append(row.name)
        self.rows.append(text)


class _Failure(NamedTuple):
    """Why an attempt gave no scores: what the server said, and for how long it asks to wait, if it does."""

    detail: str
    wait_seconds: float | None = None


class RemoteReward:
    """Scores replies with a reward model behind an address: one of another size, or on other cards.

    A TRL reward function that takes the place of `RewardModelReward`: same columns, same scores, same errors. Images
    are sent as the bytes of their files, decoded ones as BMP. Each process sends its own rows, several requests at a
    time, and gets the scores in their order. While the server does not answer (it is restarted, or busy), the same
    rows are sent again, after 1, 2, 4, ... up to 30 seconds; nothing is lost, and scores do not depend on it.

    Args:
        address: Of the server, such as "http://localhost:8100".
        name: The name under which TRL logs the reward.
        key_variable: Environment variable that holds the server's key; None sends none. No message and no `repr` shows
            it.
        batch_size: Rows per request at most. With the server's own batch size, rows are scored in the batches in
            which `RewardModelReward` would score them, and scores are the same to the last digit.
        request_bytes: A request of several rows is not larger than this.
        concurrency: Requests at once, on each process: one is scored while the next one is on its way.
        timeout_seconds: For one attempt, waiting for its turn at the server included.
        patience_seconds: How long a request may go without an answer before the run ends.
        first_wait_seconds: Wait before the second attempt.

    Raises:
        ValueError: The address or the variable of the key cannot be used.

    Example:
        >>> reward = RemoteReward("http://gpu-7:8100", key_variable="REWARD_KEY")
        >>> trainer = PPOTrainer(model="policy", reward_funcs=reward, train_dataset=rows_with_images_and_facts)
    """

    def __init__(
        self,
        address: str,
        *,
        name: str = "reward_model",
        key_variable: str | None = None,
        batch_size: int = 16,
        request_bytes: int = 64 << 20,
        concurrency: int = 2,
        timeout_seconds: float = 600.0,
        patience_seconds: float = 900.0,
        first_wait_seconds: float = 1.0,
    ):
        check_server_address(address, "address")
        numbers = {"batch_size": batch_size, "request_bytes": request_bytes, "concurrency": concurrency}
        numbers |= {"timeout_seconds": timeout_seconds, "patience_seconds": patience_seconds}
        for option, value in {**numbers, "first_wait_seconds": first_wait_seconds}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"`{option}` is {value}; it must be above 0.")
        self.__name__ = name
        self.address = address.rstrip("/")
        self.batch_size = batch_size
        self.request_bytes = request_bytes
        self.concurrency = concurrency
        self.patience_seconds = patience_seconds
        self.first_wait_seconds = first_wait_seconds
        key = None if key_variable is None else key_in(key_variable)
        self._scoring = JSONServer(f"{self.address}/score", key, timeout_seconds)
        self._health = JSONServer(f"{self.address}/health", key, HEALTH_SECONDS)

    def __repr__(self) -> str:
        return f"RemoteReward({self.address!r})"

    def health(self) -> dict[str, Any]:
        """What the server says of itself: `model`, `revision`, `template`, `batch_size`, `limits`; asked once.

        Raises:
            ConnectionError: There is no reward server, or it refuses the key.
        """
        try:
            response = self._health.get()
        except (OSError, http.client.HTTPException, BodyTooLarge) as error:
            raise ConnectionError(
                f"No reward server answers at {self.address} ({self._harmless(f'{type(error).__name__}: {error}')}). "
                "Is `trl-vlm serve-reward` running there?"
            ) from None
        about = _json(response.body)
        if response.status != 200:
            self._refused(response, [])
        if not isinstance(about, dict) or "model" not in about:
            raise ConnectionError(f"{self.address} is no reward server: it does not say which model it serves.")
        return about

    def served(self) -> dict[str, Any]:
        """Which model the server has: `model`, `revision`, `template`.

        Raises:
            ConnectionError: As for `health`.
        """
        about = self.health()
        return {name: about.get(name) for name in ("model", "revision", "template")}

    def __call__(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        completion_ids: Sequence[Sequence[int]] | None = None,
        images: Sequence[Sequence[object] | None] | None = None,
        image: Sequence[object] | None = None,
        facts: Sequence[Sequence[str] | None] | None = None,
        row_name: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float]:
        """The score of each reply; the arguments are those of `RewardModelReward.__call__`.

        Raises:
            RowError: The server refused a row; the message names it.
            ConnectionError: The server gave no scores in time, or refuses every request.
        """
        rows = judged_rows(prompts, completions, images=images, image=image, facts=facts, row_name=row_name)
        pool, is_over = ThreadPoolExecutor(self.concurrency), threading.Event()
        try:
            parts = pool.map(partial(self._scores, is_over=is_over), self._batches(rows))
            return [score for scores in parts for score in scores]
        finally:
            is_over.set()  # after an error nobody waits for the other requests
            pool.shutdown(cancel_futures=True)

    def _batches(self, rows: Sequence[JudgedRow]) -> Iterator[_Batch]:
        """The rows as JSON, not more of them at once than the limits allow."""
        known: dict[int, str] = {}
        batch = _Batch()
        for row in rows:
            for place, image in enumerate(row.images):
                if id(image) not in known:
                    known[id(image)] = image_uri(image, f"{row.name}, image {place}")
            uris = [known[id(image)] for image in row.images]
            if len(batch.rows) == self.batch_size or (batch.rows and batch.size_with(uris) > self.request_bytes):
                yield batch
                batch = _Batch()
            batch.add(row, uris)
        if batch.rows:
            yield batch

    def _scores(self, batch: _Batch, is_over: threading.Event) -> list[float]:
        """The scores of a batch, however often it takes to get them; none once the call is over."""
        body, start = request_body(batch.rows, list(batch.images)), time.monotonic()
        for attempt in count():
            result = self._attempt(body, batch)
            if not isinstance(result, _Failure):
                return result
            # The jitter keeps processes that failed together from coming back together.
            wait = min(LONGEST_WAIT_SECONDS, self.first_wait_seconds * 2**attempt) * random.uniform(0.75, 1.25)
            if result.wait_seconds is not None:
                wait = min(max(result.wait_seconds, 0.0), LONGEST_WAIT_SECONDS)
            if time.monotonic() - start + wait > self.patience_seconds:
                raise ConnectionError(
                    f"The reward server {self.address} gave no scores of {_listed(batch.names)} for "
                    f"{self.patience_seconds:g} s ({attempt + 1} attempts; the last: {result.detail}). Is "
                    "`trl-vlm serve-reward` running there? A run resumes from its last checkpoint."
                )
            logger.warning("The reward server %s: %s. Asking again in %.1f s.", self.address, result.detail, wait)
            if is_over.wait(wait):
                break
        return []

    def _attempt(self, body: bytes, batch: _Batch) -> "list[float] | _Failure":
        """One request."""
        try:
            response = self._scoring.post(body)
        except (OSError, http.client.HTTPException, BodyTooLarge) as error:
            return _Failure(self._harmless(f"{type(error).__name__}: {error}"))
        scores = _scores_in(response, len(batch.rows))
        if scores is not None:
            return scores
        if response.status != 200 and (not is_passing(response.status) or response.status == NO_ROOM):
            self._refused(response, batch.names)
        headers = {name.lower(): value for name, value in response.headers.items()}
        return _Failure(self._harmless(_said(response)), retry_after_seconds(headers.get("retry-after")))

    def _refused(self, response: Response, names: Sequence[str]) -> NoReturn:
        """Raises what a status means that no further attempt can change."""
        said, status = self._harmless(_said(response)), response.status
        if status in (401, 403):
            raise ConnectionError(
                f"The reward server {self.address} refuses the key ({said}). Set `key_variable` to the environment "
                "variable that holds the key with which the server was started."
            )
        row = _row_in(response)
        if status == 422 and row is not None and row < len(names):
            message = self._harmless(_message_in(response))
            prefix = "" if names[row] in message else f"{names[row]}: "
            raise RowError(f"{prefix}{message} (refused by the reward server {self.address})")
        what = _listed(names) if names else "the request"
        raise ConnectionError(f"The reward server {self.address} refuses {what} ({said}).")

    def _harmless(self, text: str) -> str:
        """What a server said, on one line, not too long, and without the key."""
        text = " ".join(self._scoring.without_key(text).split())
        return "".join(letter if letter.isprintable() else " " for letter in text)[:1000]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _scores_in(response: Response, count: int) -> list[float] | None:
    """The scores in an answer; None if it is another one, of a proxy perhaps."""
    content = _json(response.body) if response.status == 200 else None
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        return None
    if not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        return None
    return [float(score) for score in scores]


def _detail(response: Response) -> Any:
    content = _json(response.body)
    return content.get("detail") if isinstance(content, dict) else None


def _row_in(response: Response) -> int | None:
    """The index of the row that the server refuses."""
    detail = _detail(response)
    row = detail.get("row") if isinstance(detail, dict) else None
    return row if type(row) is int and row >= 0 else None


def _message_in(response: Response) -> str:
    detail = _detail(response)
    message = detail.get("message") if isinstance(detail, dict) else detail
    return message if isinstance(message, str) else response.body[:1000].decode(errors="replace")


def _said(response: Response) -> str:
    return f"HTTP {response.status}: {_message_in(response)}"
