"""A model behind an OpenAI-compatible endpoint: retries, a spending cap, answers on disk, no secret in a message."""

import base64
import hashlib
import http.client
import io
import json
import logging
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from trl_vlm.data.images import load_image
from trl_vlm.data.io.http import (
    BodyTooLarge,
    JSONServer,
    Response,
    check_server_address,
    is_passing,
    key_in,
    retry_after_seconds,
)
from trl_vlm.data.messages import without_control_tokens
from trl_vlm.judges.cache import AnswerCache
from trl_vlm.judges.chat import CUT_OFF, Answer, Request, answer
from trl_vlm.judges.spending import Spending

logger = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 60.0  # between two attempts, unless the endpoint names a longer time
LONGEST_ASKED_WAIT_SECONDS = 600.0  # the longest wait that an endpoint may ask for; beyond it the request is abandoned
SHOWN_EVERY_SECONDS = 60.0  # what was spent
HOPELESS = (401, 402, 404)  # key, account, address or model: no request can succeed
ENDED = (None, "", "stop", "eos", "eos_token", "stop_sequence", "end_turn")  # how servers mark a complete answer
TOO_LONG = ("length", "max_tokens")
NOT_JSON = "the answer was not JSON"
OTHER_FORM = "the answer had another form"
WITHHELD = "the answer was withheld or broken off"


class SpendingCapReached(RuntimeError):
    """As many requests were sent as `max_requests` allows."""


class _Failure(NamedTuple):
    """Why an attempt gave no answer.

    Args:
        reason: In a few words that can be counted.
        detail: What the endpoint said of it.
        passing: Whether another attempt may succeed.
        wait_seconds: For how long the endpoint asks to wait, if it does.
    """

    reason: str
    detail: str
    passing: bool = True
    wait_seconds: float | None = None


class EndpointChat:
    """A model behind an OpenAI-compatible endpoint.

    A request with a temporary failure (time-out, no connection, 429, 5xx, an answer that is no JSON) is repeated,
    after 1, 2, 4, ... seconds or as long as the endpoint's Retry-After says. If every attempt fails it has no answer,
    and the other requests continue; a call in which all fail raises an error. Redirects are not followed, so that
    questions go only to the given address.

    Args:
        base_url: Address of the endpoint, for example "http://localhost:8000/v1".
        model: Name of the model there.
        key_variable: Environment variable that holds the key; None sends none. No message and no `repr` shows
            it.
        max_tokens: Longest answer; a longer one does not count. None leaves it to the endpoint.
        temperature: 0 asks for the likeliest answer; None leaves it to the endpoint.
        extra_body: Further settings in the endpoint's own names: `{"max_completion_tokens": 512}`.
        concurrency: Requests at once.
        timeout_seconds: For one attempt, from its beginning to the last byte of the answer.
        retries: Attempts after the first.
        first_wait_seconds: Wait before the second attempt.
        max_requests: Requests that this object may send, repeated ones included; None sets no limit.
        prompt_price: Price of a million tokens of requests, for the cost in `spending`.
        completion_price: Price of a million tokens of answers.
        cache: Folder for answers. A request with the same model, text, images and settings is not sent again.
        image_side: Longer side of an image as it is sent, in pixels, at most; larger ones are scaled down. Images go
            as JPEG of quality 95.
        whole_only: Whether an answer that was cut off or is empty counts as none, as a judge's must. Otherwise it is
            the text that came, with `CUT_OFF` as its reason if it was cut off; that needs `cache=None`.

    Raises:
        ValueError: The address or the variable of the key cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str | None = None,
        max_tokens: int | None = 512,
        temperature: float | None = 0.0,
        extra_body: dict[str, Any] | None = None,
        concurrency: int = 8,
        timeout_seconds: float = 120.0,
        retries: int = 6,
        first_wait_seconds: float = 1.0,
        max_requests: int | None = None,
        prompt_price: float | None = None,
        completion_price: float | None = None,
        cache: str | os.PathLike | None = None,
        image_side: int = 1536,
        whole_only: bool = True,
    ):
        check_server_address(base_url)
        _check_numbers(
            concurrency=concurrency, timeout_seconds=timeout_seconds, image_side=image_side, max_requests=max_requests
        )
        for name, price in (("prompt_price", prompt_price), ("completion_price", completion_price)):
            if price is not None and not 0 <= price < math.inf:
                raise ValueError(f"`{name}` is {price}; it must be 0 or more.")
        if retries < 0 or not 0 <= first_wait_seconds < math.inf:
            raise ValueError(f"`retries` is {retries}, `first_wait_seconds` {first_wait_seconds}; needed: 0 or more.")
        if taken := {"model", "messages", "stream"} & set(extra_body or ()):
            raise ValueError(f"`extra_body` holds {sorted(taken)}, which are set already. Remove them.")
        if not whole_only and cache is not None:
            raise ValueError("`whole_only=False` needs `cache=None`: the cache does not say which answer was cut off.")
        self.base_url = base_url
        self.model = model
        self.whole_only = whole_only
        self.settings = {"max_tokens": max_tokens, "temperature": temperature, "extra_body": extra_body}
        self.concurrency = concurrency
        self.retries = retries
        self.first_wait_seconds = first_wait_seconds
        self.max_requests = max_requests
        self.cache = AnswerCache(cache) if cache is not None else None
        self.image_side = image_side
        self.requests_sent = 0
        self.answers_from_cache = 0
        self.tokens: Counter[str] = Counter()  # as the endpoint counts them: "prompt" and "completion"
        self.prompt_price, self.completion_price = prompt_price, completion_price
        self._shown_at = time.monotonic()
        self.served: set[str] = set()  # what the endpoint calls the model that answers
        self._has_answered = False
        self._lock = threading.Lock()
        key = None if key_variable is None else key_in(key_variable)
        self._client = JSONServer(f"{base_url.rstrip('/')}/chat/completions", key, timeout_seconds)

    def __repr__(self) -> str:
        return f"EndpointChat({self.base_url!r}, {self.model!r})"

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request.

        Raises:
            ConnectionError: No request got an answer, or none ever can (key, account, address, model).
            SpendingCapReached: `max_requests` is used up; earlier answers are in `cache`.
        """
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            results = list(pool.map(self._answer, requests))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error no further request is paid for
            self._show_spending()
        failures = [result for result in results if isinstance(result, _Failure)]
        if results and len(failures) == len(results) and (failures[-1].passing or not self._has_answered):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(f.reason for f in failures).items())
            raise ConnectionError(
                f"{self.base_url} gave no answer to any of {len(results)} requests ({reasons}; the last: "
                f"{failures[-1].detail}). Is the server up, the address right, and does it serve the model "
                f"{self.model!r} with images? Answers so far are kept if a `cache` is set."
            )
        return [Answer(None, result.reason) if isinstance(result, _Failure) else result for result in results]

    @property
    def spending(self) -> Spending:
        """What this object has spent."""
        prompt, completion = self.tokens["prompt"], self.tokens["completion"]
        cost = None
        if self.prompt_price is not None or self.completion_price is not None:
            cost = (prompt * (self.prompt_price or 0.0) + completion * (self.completion_price or 0.0)) / 1e6
        return Spending(self.requests_sent, self.answers_from_cache, prompt, completion, cost)

    def _show_spending(self) -> None:
        """Logs what was spent, from time to time."""
        if self.requests_sent and time.monotonic() - self._shown_at >= SHOWN_EVERY_SECONDS:
            self._shown_at = time.monotonic()
            logger.info("%s at %s: %s.", self.model, self.base_url, self.spending)

    def _answer(self, request: Request) -> Answer | _Failure:
        """The answer to one request, from the cache or from the endpoint."""
        # Replies may contain tokens that end the user's turn, and servers would read them as such.
        text = {"type": "text", "text": without_control_tokens(request.text)}
        body = self._body({"role": "user", "content": [*self._images(request), text]})
        key = hashlib.sha256(self._client.address.encode() + b"\n" + body).hexdigest()
        kept = self.cache.get(key) if self.cache is not None else None
        if kept is not None:
            with self._lock:
                self.answers_from_cache += 1
            return Answer(kept)
        for attempt in range(self.retries + 1):
            result = self._attempt(body)
            if isinstance(result, Answer):
                self._has_answered = True
                if self.cache is not None and result.text is not None:
                    self.cache.put(key, result.text, self.model)
                return result
            # The jitter keeps requests that failed together from coming back together.
            backoff = min(LONGEST_WAIT_SECONDS, self.first_wait_seconds * 2**attempt)
            wait = backoff * random.Random(f"{key} {attempt}").uniform(0.75, 1.25)
            if result.wait_seconds is not None:
                wait = max(result.wait_seconds, 0.0)
            if not result.passing or attempt == self.retries or wait > LONGEST_ASKED_WAIT_SECONDS:
                break
            logger.info("%s: %s; attempt %d follows in %.1f s.", request.name, result.reason, attempt + 2, wait)
            time.sleep(wait)
        logger.warning("%s: no answer (%s).", request.name, result.reason)
        return result

    def _body(self, message: dict[str, Any]) -> bytes:
        """The request as JSON; equal content gives equal bytes."""
        settings = {name: value for name, value in self.settings.items() if value is not None}
        body = {"model": self.model, "messages": [message], **settings.pop("extra_body", {}), **settings}
        return json.dumps(body, sort_keys=True).encode()

    def _attempt(self, body: bytes) -> Answer | _Failure:
        """One request."""
        self._count()
        try:
            response = self._client.post(body)
        except TimeoutError as error:
            return _Failure("timed out", str(error))
        except BodyTooLarge as error:
            return _Failure("the answer was too large", str(error), passing=False)
        except (OSError, http.client.HTTPException) as error:
            return _Failure("no connection", self._harmless(f"{type(error).__name__}: {error}"))
        if response.status != 200:
            return self._refusal(response)
        result = _answer_in(response.body, self.whole_only)
        if isinstance(result, _Failure):
            return result
        with self._lock:
            self.served |= result.served
            self.tokens += result.tokens
        return result.answer

    def _refusal(self, response: Response) -> _Failure:
        """What a status other than 200 means."""
        status, headers = response.status, {name.lower(): value for name, value in response.headers.items()}
        detail = self._harmless(f"HTTP {status}: {response.body[:2000].decode(errors='replace')}")
        if status in HOPELESS:
            raise ConnectionError(
                f"{self.base_url} refuses every request (HTTP {status}): {detail}. Check the key and its variable "
                f"(`key_variable`), the account, the address, and that the model is called {self.model!r} there."
            )
        if 300 <= status < 400:
            target = self._harmless(headers.get("location", "?"))
            detail = f"it redirects to {target!r}, which is not followed: name the final address"
        may_pass = is_passing(status)
        return _Failure(f"HTTP {status}", detail, may_pass, retry_after_seconds(headers.get("retry-after")))

    def _count(self) -> None:
        with self._lock:
            if self.max_requests is not None and self.requests_sent >= self.max_requests:
                raise SpendingCapReached(
                    f"{self.requests_sent} requests were sent to {self.base_url}, as many as `max_requests` allows. "
                    "Raise it and go on; with a `cache`, what was answered is not asked again."
                )
            self.requests_sent += 1

    def _harmless(self, text: str) -> str:
        """What a server said, on one line, short, and without the key."""
        text = " ".join(self._client.without_key(text).split())
        return "".join(letter if letter.isprintable() else " " for letter in text)[:500]

    def _images(self, request: Request) -> list[dict[str, Any]]:
        """The images as parts of a message."""
        parts = []
        for place, value in enumerate(request.images):
            image = load_image(value, name=f"{request.name}, image {place}")
            if max(image.size) > self.image_side:
                image.thumbnail((self.image_side, self.image_side))
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=95)
            url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        return parts


class _Read(NamedTuple):
    """An answer, what the server calls the model that gave it, and the tokens that it counts."""

    answer: Answer
    served: set[str]
    tokens: Counter[str]


def _answer_in(body: bytes, whole_only: bool) -> _Read | _Failure:
    """The answer in a response's body; any deviation from the expected form is a failure."""
    try:
        output = json.loads(body)
    except (ValueError, RecursionError):  # JSON, its encoding, or brackets without end
        return _Failure(NOT_JSON, NOT_JSON)
    choices = output.get("choices") if isinstance(output, dict) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict) or "content" not in message:
        return _Failure(OTHER_FORM, "an answer without exactly one `choices[0].message.content`")
    text, reason = message["content"], choice.get("finish_reason")
    if not isinstance(text, str | None) or not isinstance(reason, str | None):
        return _Failure(OTHER_FORM, "an answer whose content or finish_reason is no text")
    name = output.get("model")
    served = {name} if isinstance(name, str) and name else set()
    tokens = _tokens(output.get("usage"))
    # JSON can hold a lone surrogate, and files cannot.
    text = None if text is None else text.encode(errors="replace").decode()
    is_cut = reason in TOO_LONG
    if not is_cut and reason not in ENDED:  # "content_filter", "tool_calls", ...
        return _Read(Answer(None, WITHHELD), served, tokens)
    if not whole_only:
        return _Read(Answer(text or "", CUT_OFF if is_cut else ""), served, tokens)
    return _Read(Answer(None, CUT_OFF) if is_cut else answer(text), served, tokens)


def _tokens(usage: object) -> Counter[str]:
    """The tokens of a request ("prompt") and of its answer ("completion"), where the server counts them."""
    counts = usage if isinstance(usage, dict) else {}
    found = {name: counts.get(f"{name}_tokens") for name in ("prompt", "completion")}
    return Counter({name: count for name, count in found.items() if type(count) is int and count >= 0})


def _check_numbers(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` is {value}; it must be above 0.")
