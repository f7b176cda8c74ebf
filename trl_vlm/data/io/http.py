"""One request of JSON with a deadline and a size limit, whatever the server does; addresses, keys and waits."""

import http.client
import math
import os
import re
import socket
import ssl
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

LARGEST_BODY_BYTES = 8 << 20
CHUNK_BYTES = 1 << 16
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PASSING = (408, 409, 425, 429)  # and all from 500 on: another attempt may succeed
KEY = re.compile(r"[\x21-\x7e]+")  # what a header can hold


class BodyTooLarge(Exception):
    """The server sent more than an answer may have."""


class Response(NamedTuple):
    """What a server sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class JSONServer:
    """A server that is asked without following redirects, decompressing, or keeping connections.

    Proxies of the environment are used, except for this machine itself.

    Args:
        address: What is asked for.
        key: Sent as a bearer token; None sends none. No `repr` shows it.
        timeout_seconds: From the beginning of an attempt to the last byte of its answer.
    """

    def __init__(self, address: str, key: str | None, timeout_seconds: float):
        self.address, self.timeout_seconds, self._key = address, timeout_seconds, key

    def __repr__(self) -> str:
        return f"JSONServer({self.address!r})"

    def without_key(self, text: str) -> str:
        """The text with the key made unreadable."""
        return text if self._key is None else text.replace(self._key, "***")

    def post(self, body: bytes) -> Response:
        """Posts `body`.

        Raises:
            TimeoutError: The whole answer was not there in time.
            BodyTooLarge: It is larger than `LARGEST_BODY_BYTES`.
            OSError, http.client.HTTPException: No connection, or one that broke.
        """
        return self._ask("POST", body)

    def get(self) -> Response:
        """Asks without a body.

        Raises:
            TimeoutError, BodyTooLarge, OSError, http.client.HTTPException: As in `post`.
        """
        return self._ask("GET", None)

    def _ask(self, method: str, body: bytes | None) -> Response:
        connection, target, headers = self._connection()
        is_late, sockets = threading.Event(), []

        def stop() -> None:
            is_late.set()
            for each in (*sockets, connection.sock):
                if each is not None:
                    with suppress(OSError):
                        # The plain socket, also under TLS: a blocked read then ends with an error.
                        socket.socket.shutdown(each, socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout_seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            sockets.append(connection.sock)  # the connection forgets it once the headers are there
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            result = Response(response.status, dict(response.headers.items()), _limited(response))
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            # A socket that is closed under its reader raises one or the other.
            if is_late.is_set():
                raise TimeoutError(f"no answer within {self.timeout_seconds:g} s") from None
            raise
        finally:
            timer.cancel()
            connection.close()
        if is_late.is_set():  # the end of the connection looked like the end of the answer
            raise TimeoutError(f"no answer within {self.timeout_seconds:g} s")
        return result

    def _connection(self) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """A connection that is not yet open, what to ask it for, and the headers."""
        address = urlsplit(self.address)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Connection": "close", "User-Agent": "trl_vlm"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        is_safe, port = address.scheme == "https", address.port
        host = _host(address)
        proxy = _proxy(address.scheme, host)
        if proxy is None:
            return self._to(host, port, is_safe), address.path, headers
        where = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        login = {}
        if where.username is not None:
            pair = f"{unquote(where.username)}:{unquote(where.password or '')}"
            login = {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode()}"}
        if is_safe:
            tunnel = self._to(_host(where), where.port, is_safe)
            tunnel.set_tunnel(host, port, login)
            return tunnel, address.path, headers
        return self._to(_host(where), where.port, is_safe), self.address, headers | login

    def _to(self, host: str, port: int | None, is_safe: bool) -> http.client.HTTPConnection:
        if is_safe:
            return http.client.HTTPSConnection(host, port, timeout=self.timeout_seconds, context=_certificates())
        return http.client.HTTPConnection(host, port, timeout=self.timeout_seconds)


def _limited(response: http.client.HTTPResponse) -> bytes:
    """The body, which is whole and not too large."""
    body = bytearray()
    while chunk := response.read(CHUNK_BYTES):
        body += chunk
        if len(body) > LARGEST_BODY_BYTES:
            raise BodyTooLarge(f"an answer of more than {LARGEST_BODY_BYTES:,} bytes")
    if response.length:  # what is missing of the length that was announced
        raise http.client.IncompleteRead(bytes(body[:100]), response.length)
    return bytes(body)


def _host(address: SplitResult) -> str:
    if not address.hostname:  # the address itself may hold a password
        raise ValueError("The address of the endpoint, or of the proxy before it, names no host.")
    return address.hostname


def _proxy(scheme: str, host: str) -> str | None:
    if host in LOOPBACK or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(scheme)


def _certificates() -> ssl.SSLContext:
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if not os.environ.get("SSL_CERT_FILE") and paths.cafile is None and paths.capath is None:
        # Without certificates from anywhere the connection is refused, with the reason.
        with suppress(ImportError):
            import certifi  # pyright: ignore[reportMissingImports]  whoever has it has it from another package

            context.load_verify_locations(certifi.where())
    return context


def is_passing(status: int) -> bool:
    """Whether another attempt may succeed after this status."""
    return status in PASSING or status >= 500


def key_in(variable: str) -> str:
    """The key in an environment variable; no error shows it.

    Raises:
        ValueError: There is none, or it can stand in no header.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"The environment variable {variable!r} is empty or not set. Put the endpoint's key into it, or "
            "set `key_variable=None` for an endpoint without keys."
        )
    if not KEY.fullmatch(key):
        raise ValueError(
            f"The key in the environment variable {variable!r} holds a line break, a blank or a letter that no key "
            "has. Was more than the key copied?"
        )
    return key


def check_server_address(address: str, option: str = "base_url") -> None:
    """Refuses what is no address of a server, or holds a secret.

    Args:
        address: The address.
        option: What errors call it.

    Raises:
        ValueError: It cannot be used.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"`{option}` is {address.split('@')[-1]!r}. It must be an address such as 'http://localhost:8000/v1'."
        )
    if parts.username is not None or parts.password is not None or parts.query:
        raise ValueError(
            f"`{option}` (at {parts.hostname}) holds a user name, a password or a query, which logs would show. "
            "Put the key into an environment variable and name that (`key_variable`)."
        )


def retry_after_seconds(value: str | None) -> float | None:
    """What a Retry-After header asks for: seconds, or a date; None if it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):  # no date; a date without its zone; the year 99999
            return None
    return seconds if math.isfinite(seconds) else None
