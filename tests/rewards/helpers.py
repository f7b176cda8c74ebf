"""Reward servers on this machine, in a thread; a reward model to serve, and a stand-in that costs nothing."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from tests import families
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.data.messages import reply_text
from trl_vlm.models.reward_model import load_reward_model

TEMPLATE = JudgeTemplate("judge . {facts}", "facts : {bullets} .", bullet="{fact}", separator=" ; ", opening="it is")


def save_reward_model(folder) -> None:
    """A reward model as `RewardTrainer` saves it: model with head, processor, template."""
    load_reward_model(families.saved("llava", sharp=8.0), head_seed=1).save_pretrained(folder)
    families.load_processor("llava").save_pretrained(folder)
    TEMPLATE.save_pretrained(folder)


class Lengths:
    """Scores a reply by its length, as a reward model would be called."""

    batch_size = 4

    def __init__(self, seconds: float = 0.0):
        self.calls: list[list[str]] = []
        self.seconds = seconds

    def __call__(self, prompts, completions, images, facts, row_name) -> list[float]:
        time.sleep(self.seconds)
        self.calls.append([reply_text(reply) for reply in completions])
        return [len(text) + len(pictures) / 8 for text, pictures in zip(self.calls[-1], images, strict=True)]


class Running:
    """A server in a thread."""

    def __init__(self, app: FastAPI, port: int = 0):
        config = uvicorn.Config(
            app, host="127.0.0.1", port=port, log_config=None, access_log=False, lifespan="off", ws="none"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def stop(self, *, at_once: bool = False) -> None:
        """Ends the server; `at_once` also breaks off what it is doing, as a kill would."""
        self.server.force_exit = at_once
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def running(app: FastAPI, port: int = 0) -> Iterator[Running]:
    server = Running(app, port)
    try:
        yield server
    finally:
        server.stop(at_once=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
