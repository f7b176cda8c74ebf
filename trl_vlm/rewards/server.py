"""The server of `trl-vlm serve-reward`: rows come in as JSON, and the scores of `RewardModelReward` go out.

`RemoteReward` is its client. Nothing in a request is taken for a path, an address or code; what is too large is
refused before it is decoded.
"""

import asyncio
import base64
import binascii
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trl_vlm.data.errors import RowError
from trl_vlm.data.images import image_pixels
from trl_vlm.rewards.reward_model import RewardModelReward

DATA_URI = re.compile(r"data:[^,]{0,100};base64,")
BAD_ROW = (ValueError, TypeError, TemplateError)  # what scoring raises about rows


@dataclass(frozen=True)
class Limits:
    """What a request may hold.

    Args:
        body_bytes: Size of a request.
        rows: Rows of a request.
        pixels: Pixels of all images of a request, as their headers say.
        images: Images of a row.
        characters: Characters of a row's texts.
        waiting: Requests at once; the next one is told to come back.
        body_seconds: Time in which a request must have arrived.
    """

    body_bytes: int = 128 << 20
    rows: int = 256
    pixels: int = 512_000_000
    images: int = 64
    characters: int = 1_000_000
    waiting: int = 64
    body_seconds: float = 120.0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Place(_Strict):
    # Without a place for an image of its own: a path there would be read from this machine.
    type: Literal["image"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")  # calls of tools
    role: str
    content: str | list[Annotated[_Text | _Place, Field(discriminator="type")]] | None = None


class _Row(_Strict):
    prompt: list[_Message]
    completion: list[_Message]
    images: list[str | int] = []
    facts: list[str] = []
    name: str | None = None


class _Rows(_Strict):
    rows: list[_Row]
    images: list[str] = []


class RewardServer:
    """Scores the rows of requests, one request after another, each in batches of its own.

    So the scores of a request do not depend on who else asks.

    Args:
        reward: Scores.
        about: What `/health` says of the model.
        key: What requests must bring as a bearer token; None asks for none.
        limits: What they may hold.
    """

    def __init__(self, reward: RewardModelReward, about: Mapping[str, Any], key: str | None, limits: Limits):
        self.reward, self.about, self.limits = reward, dict(about), limits
        self._key = key
        self._waiting = 0
        self._turn = asyncio.Lock()
        self._scorer = ThreadPoolExecutor(1)  # all of torch's work in one thread

    async def health(self, request: Request) -> JSONResponse:
        """What is served, and how busy the server is."""
        self._check_key(request)
        about = {"batch_size": self.reward.batch_size, "limits": asdict(self.limits), "waiting": self._waiting}
        return JSONResponse({"status": "ok", **self.about, **about})

    async def score(self, request: Request) -> JSONResponse:
        """The scores of a request's rows."""
        try:
            self._check(request)
        except HTTPException:
            await self._body(request, keep=False)  # a client that is still sending would not hear the answer
            raise
        self._waiting += 1
        try:
            rows = await run_in_threadpool(_read, await self._body(request), self.limits)
            async with self._turn:
                if await request.is_disconnected():
                    return JSONResponse({"detail": "nobody waits for the scores"}, 499)
                loop = asyncio.get_running_loop()
                scores = await loop.run_in_executor(self._scorer, self._scores, rows)
        finally:
            self._waiting -= 1
        return JSONResponse({"scores": scores})

    def _check(self, request: Request) -> None:
        """Refuses a request by its headers."""
        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the request is not `application/json`")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body_bytes:
            raise self._too_large()
        if self._waiting >= self.limits.waiting:
            raise HTTPException(503, f"{self._waiting} requests are waiting", headers={"Retry-After": "1"})

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._key is not None and not secrets.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            raise HTTPException(401, "the key is missing or wrong", headers={"WWW-Authenticate": "Bearer"})

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413, f"a request may have {self.limits.body_bytes:,} bytes; send fewer rows at once, or smaller images"
        )

    async def _body(self, request: Request, *, keep: bool = True) -> bytes:
        """The body of a request, read to its end; what is too much of it is not kept."""
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if keep and size <= self.limits.body_bytes:
                        body += chunk
        except TimeoutError:
            raise HTTPException(408, f"the request took more than {self.limits.body_seconds:g} s to arrive") from None
        if keep and size > self.limits.body_bytes:
            raise self._too_large()
        return bytes(body)

    def _scores(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        try:
            return self._scored(rows)
        except torch.OutOfMemoryError as error:
            raise HTTPException(
                507, f"out of memory; start the server with a smaller --batch-size ({error})"
            ) from error
        except BAD_ROW as error:
            fault = error
        for index, row in enumerate(rows):  # which one was it?
            try:
                self._scored([row])
            except BAD_ROW as error:
                raise _bad_row(index, str(error)) from error
        raise HTTPException(422, {"row": None, "message": str(fault)})

    def _scored(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        columns = {name: [row[name] for row in rows] for name in ("images", "facts", "row_name")}
        return self.reward([row["prompt"] for row in rows], [row["completion"] for row in rows], **columns)


def make_app(
    reward: RewardModelReward, about: Mapping[str, Any], *, key: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """The application: `GET /health` and `POST /score`.

    Args:
        reward: Scores.
        about: `model`, `revision` and `template`, as `/health` shows them.
        key: As for `RewardServer`.
        limits: As for `RewardServer`.
    """
    server = RewardServer(reward, about, key, limits or Limits())
    app = FastAPI(title="trl_vlm reward server", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/score", server.score, methods=["POST"])
    return app


def _bad_row(index: int, message: str) -> HTTPException:
    return HTTPException(422, {"row": index, "message": message})


def _read(body: bytes, limits: Limits) -> list[dict[str, Any]]:
    """The rows of a request as `RewardModelReward` takes them; images undecoded."""
    try:
        request = _Rows.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from error
    rows = request.rows
    if not rows:
        raise HTTPException(400, "the request has no rows")
    if len(rows) > limits.rows:
        raise HTTPException(413, f"the request has {len(rows)} rows; the server takes {limits.rows} at once")
    left, made, shared = limits.pixels, [], _Shared(request.images)
    for index, row in enumerate(rows):
        name = row.name or f"row {index}"
        try:
            _check_size(row, name, limits)
            images = [shared.image(uri, f"{name}, image {place}") for place, uri in enumerate(row.images)]
            left -= sum(image_pixels(image, name=f"{name}, image {place}") for place, image in enumerate(images))
        except RowError as error:
            raise _bad_row(index, str(error)) from error
        if left < 0:
            raise HTTPException(
                413, f"the images of a request may have {limits.pixels:,} pixels; send fewer rows at once"
            )
        messages = {
            part: [message.model_dump(exclude_unset=True) for message in getattr(row, part)]
            for part in ("prompt", "completion")
        }
        made.append({**messages, "images": images, "facts": row.facts, "row_name": name})
    return made


def _check_size(row: _Row, name: str, limits: Limits) -> None:
    texts = [part.text for message in row.prompt + row.completion for part in _texts(message)]
    characters = sum(map(len, [*texts, *row.facts]))
    if characters > limits.characters:
        raise RowError(f"{name}: its texts have {characters:,} characters; the server takes {limits.characters:,}.")
    if len(row.images) > limits.images:
        raise RowError(f"{name}: it has {len(row.images)} images; the server takes {limits.images}.")


class _Shared:
    """The images that a request holds once for all its rows, each decoded from base64 when a row first needs it."""

    def __init__(self, uris: Sequence[str]):
        self._uris, self._files = uris, dict[int, bytes]()

    def image(self, uri: str | int, name: str) -> bytes:
        """The file behind a data URI, or behind the place of one among the request's."""
        if isinstance(uri, str):
            return _file(uri, name)
        if not 0 <= uri < len(self._uris):
            raise RowError(f"{name}: it is image {uri} of the request, which has {len(self._uris)}.")
        if uri not in self._files:
            self._files[uri] = _file(self._uris[uri], name)
        return self._files[uri]


def _file(uri: str, name: str) -> bytes:
    """The bytes in a data URI."""
    start = DATA_URI.match(uri)
    if start is None:
        raise RowError(f"{name}: it is no data URI (data:image/png;base64,...). No path is read.")
    try:
        return base64.b64decode(uri[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"{name}: its base64 cannot be decoded ({error}).") from error


def _texts(message: _Message) -> list[_Text]:
    if isinstance(message.content, str):
        return [_Text(type="text", text=message.content)]
    return [part for part in message.content or () if isinstance(part, _Text)]


def _invalid(error: ValidationError) -> HTTPException:
    """What is wrong with the form of a request, and in which row."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    start = faults[0]["loc"][:2]
    # Of a value that may have several forms there is a fault for each; the deepest one is that of the form it has.
    fault = max((fault for fault in faults if fault["loc"][:2] == start), key=lambda fault: len(fault["loc"]))
    if len(start) == 2 and isinstance(start[1], int):
        where = ".".join(map(str, fault["loc"][2:5]))
        return _bad_row(start[1], f"{where}: {fault['msg']}" if where else fault["msg"])
    return HTTPException(400, f"{'.'.join(map(str, start)) or 'the request'}: {fault['msg']}")
