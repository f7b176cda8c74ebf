"""A model behind an OpenAI-compatible endpoint: retries, a spending cap, answers on disk, no secret in a message."""

import base64
import hashlib
import io
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient

# `HTTPError` is httpx's or httpx2's, whichever this version of huggingface_hub stands on.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError, OfflineModeIsEnabled

from trl_vlm.data.images import load_image
from trl_vlm.judges.cache import AnswerCache
from trl_vlm.judges.chat import CUT_OFF, Answer, Request, answer

logger = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 60.0  # between two attempts, unless the endpoint names a longer time
LONGEST_ASKED_WAIT_SECONDS = 600.0  # of what an endpoint may name; beyond it the request is given up
PASSING = (408, 409, 425, 429)  # and all from 500 on: another attempt may succeed
HOPELESS = (401, 402, 404)  # key, account, address or model: no request can succeed
# Without a key InferenceClient would send the Hugging Face token of this machine to whatever endpoint.
NO_KEY = "none"


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
    """A model behind an OpenAI-compatible endpoint, through `huggingface_hub.InferenceClient`.

    A request that fails in passing (time-out, no connection, 429, 5xx, an answer that is no JSON) is repeated, after
    1, 2, 4, ... seconds or as long as the endpoint's Retry-After says. If it fails in the end it gives no answer, and
    the others go on; if none of a call gives one, that is an error.

    Args:
        base_url: Address of the endpoint, for example "http://localhost:8000/v1".
        model: Name of the model there.
        key_variable: Environment variable that holds the key; None sends none. Nothing else is read, no message and
            no `repr` shows it.
        max_tokens: Longest answer; a longer one counts as none. None leaves it to the endpoint.
        temperature: 0 asks for the likeliest answer; None leaves it to the endpoint.
        extra_body: Further settings, as the endpoint knows them: `{"max_completion_tokens": 512}`.
        concurrency: Requests at once.
        timeout_seconds: For one request.
        retries: Attempts after the first.
        first_wait_seconds: Wait before the second attempt.
        max_requests: Requests that this object may send, repeated ones included; None sets no limit.
        cache: Folder for answers. What is there is not asked again: same model, text, images and settings.
        image_side: Longer side of an image as it is sent, in pixels, at most; larger ones are scaled down. Images go
            as JPEG of quality 95.

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
        cache: str | os.PathLike | None = None,
        image_side: int = 1536,
    ):
        _check_address(base_url)
        if concurrency < 1 or retries < 0:
            raise ValueError(
                f"`concurrency` is {concurrency}, `retries` {retries}; they must be above 0, and 0 or more."
            )
        key = NO_KEY if key_variable is None else os.environ.get(key_variable, "").strip()
        if not key:
            raise ValueError(
                f"The environment variable {key_variable!r} is empty or not set. Put the endpoint's key into it, or "
                "set `key_variable=None` for an endpoint without keys."
            )
        self.base_url = base_url
        self.model = model
        self.settings = {"max_tokens": max_tokens, "temperature": temperature, "extra_body": extra_body}
        self.concurrency = concurrency
        self.retries = retries
        self.first_wait_seconds = first_wait_seconds
        self.max_requests = max_requests
        self.cache = AnswerCache(cache) if cache is not None else None
        self.image_side = image_side
        self.requests_sent = 0
        self.served: set[str] = set()  # what the endpoint calls the model that answers
        self._has_answered = False
        self._lock = threading.Lock()
        self._client = InferenceClient(base_url=base_url, api_key=key, timeout=timeout_seconds)

    def __repr__(self) -> str:
        return f"EndpointChat({self.base_url!r}, {self.model!r})"

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Returns one answer per request.

        Raises:
            ConnectionError: No request got an answer, or none ever can (key, account, address, model).
            SpendingCapReached: `max_requests` is used up; what was answered until then is in `cache`.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            results = list(pool.map(self._answer, requests))
        failures = [result for result in results if isinstance(result, _Failure)]
        if results and len(failures) == len(results) and (failures[-1].passing or not self._has_answered):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(f.reason for f in failures).items())
            raise ConnectionError(
                f"{self.base_url} gave no answer to any of {len(results)} requests ({reasons}; the last: "
                f"{failures[-1].detail}). Is the server up, the address right, and does it serve the model "
                f"{self.model!r} with images? Answers so far are kept if a `cache` is set."
            )
        return [Answer(None, result.reason) if isinstance(result, _Failure) else result for result in results]

    def _answer(self, request: Request) -> Answer | _Failure:
        """The answer to one request, from the cache or after as many attempts as it may take."""
        message = {"role": "user", "content": [*self._images(request), {"type": "text", "text": request.text}]}
        key = hashlib.sha256(json.dumps([self.model, self.settings, message]).encode()).hexdigest()
        kept = self.cache.get(key) if self.cache is not None else None
        if kept is not None:
            return Answer(kept)
        for attempt in range(self.retries + 1):
            result = self._attempt(message)
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

    def _attempt(self, message: dict[str, Any]) -> Answer | _Failure:
        """One request."""
        self._count()
        try:
            output = self._client.chat_completion([message], model=self.model, **self.settings)
        except InferenceTimeoutError:
            return _Failure("timed out", f"no answer within {self._client.timeout} s")
        except HfHubHTTPError as error:
            return self._refusal(error)
        except OfflineModeIsEnabled:
            raise ConnectionError(
                f"HF_HUB_OFFLINE is set, and huggingface_hub then sends no request, not even to {self.base_url}. "
                "Unset it; models and data sets that are given as folders need no network anyway."
            ) from None
        except HTTPError as error:
            return _Failure("no connection", self._without_key(f"{type(error).__name__}: {error}"))
        except ValueError:  # JSON, or its encoding
            return _Failure("the answer was not JSON", "the answer was not JSON")
        try:
            choice = output.choices[0]
            text, is_whole = choice.message.content, choice.finish_reason != "length"
        except (AttributeError, IndexError, KeyError, TypeError):
            return _Failure("the answer had another form", "an answer without `choices[0].message.content`")
        if text is not None and not isinstance(text, str):
            return _Failure("the answer had another form", "an answer whose content is no text")
        if isinstance(output.model, str) and output.model:
            self.served.add(output.model)
        return answer(text) if is_whole else Answer(None, CUT_OFF)

    def _refusal(self, error: HfHubHTTPError) -> _Failure:
        """What a status other than 200 means."""
        status = error.response.status_code
        detail = self._without_key(" ".join(str(error).split()))[:500]
        if status in HOPELESS:
            # Not chained: the original message may hold what the server said, key and all.
            raise ConnectionError(
                f"{self.base_url} refuses every request (HTTP {status}): {detail}. Check the key and its variable "
                f"(`key_variable`), the account, the address, and that the model is called {self.model!r} there."
            ) from None
        is_passing = status in PASSING or status >= 500
        asked = error.response.headers.get("retry-after")
        return _Failure(f"HTTP {status}", detail, is_passing, _retry_after_seconds(asked))

    def _count(self) -> None:
        with self._lock:
            if self.max_requests is not None and self.requests_sent >= self.max_requests:
                raise SpendingCapReached(
                    f"{self.requests_sent} requests were sent to {self.base_url}, as many as `max_requests` allows. "
                    "Raise it and go on; with a `cache`, what was answered is not asked again."
                )
            self.requests_sent += 1

    def _without_key(self, text: str) -> str:
        return text.replace(self._client.token, "***") if self._client.token != NO_KEY else text

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


def _check_address(base_url: str) -> None:
    address = urlsplit(base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(
            f"`base_url` is {base_url.split('@')[-1]!r}. It must be an address such as 'http://localhost:8000/v1'."
        )
    if address.username is not None or address.password is not None or address.query:
        raise ValueError(
            f"`base_url` (at {address.hostname}) holds a user name, a password or a query, which would stand in logs. "
            "Put the key into an environment variable and name that (`key_variable`)."
        )


def _retry_after_seconds(value: str | None) -> float | None:
    """What a Retry-After header asks for: seconds, or a date; None if it is neither."""
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no date; a date without its zone
        return None
