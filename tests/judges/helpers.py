"""An OpenAI-compatible endpoint on this machine that does as it is told: one step of a script per request."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What the server sends: a status, headers, and a body; after a while."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}
    seconds: float = 0.0


def said(text: str | None, finish_reason: str = "stop", seconds: float = 0.0) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}
    return Reply(body=json.dumps(body).encode(), seconds=seconds)


def with_usage(reply: Reply, prompt: int = 100, completion: int = 7) -> Reply:
    """The reply of a server that counts tokens."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return reply._replace(body=json.dumps({**json.loads(reply.body), "usage": usage}).encode())


class Endpoint:
    """Counts what it is asked."""

    def __init__(self, behave: Callable[[dict[str, Any], int], Reply]):
        self.behave, self.bodies, self.keys, self.times, self.paths = behave, [], [], [], []
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, body: dict[str, Any], key: str | None) -> Reply:
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            self.times.append(time.monotonic())
            return self.behave(body, sum(body["messages"] == other["messages"] for other in self.bodies))


@contextmanager
def endpoint(behave: Callable[[dict[str, Any], int], Reply]) -> Iterator[Endpoint]:
    """Serves `behave(body, how many times these messages came)`."""
    state = Endpoint(behave)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.paths.append(self.path)
            reply = state.reply(body, self.headers["Authorization"])
            time.sleep(reply.seconds)
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has stopped waiting

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
