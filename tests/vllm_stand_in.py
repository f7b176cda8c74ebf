"""vLLM's server and engine, which cannot run here, as TRL's classes see them; the tokens that they sample."""

import sys
from types import ModuleType, SimpleNamespace

from trl.generation.vllm_generation import VLLMGeneration

from trl_vlm.trainers.dpo import vllm

WORDS = [70, 71, 72, 73, 74, 75, 76, 77]


def said(seed, temperature, max_tokens):
    """Tokens that depend on the seed alone."""
    return [WORDS[(seed >> place) % len(WORDS)] for place in range(max_tokens)]


class Client:
    """A server's client: as many calls at once as there are requests."""

    made: list["Client"] = []

    def __init__(self, base_url=None, connection_timeout=0.0):
        self.base_url, self.timeout, self.requests, self.images = base_url, connection_timeout, [], []
        self.model = "a-model"
        Client.made.append(self)

    def image_features(self, images):
        self.images += images
        return [None if row is None else {"mm_placeholders": {"image": [None] * len(row)}} for row in images]

    def generate(self, prompts, features=None, *, logprobs, generation_kwargs, **settings):
        self.requests.append((prompts, features, generation_kwargs["seed"], settings))
        tokens = said(generation_kwargs["seed"], settings["temperature"], settings["max_tokens"])
        return {"completion_ids": [tokens], "logprobs": logprobs}


class Engine:
    """An engine of this process."""

    def __init__(self):
        self.inputs = []

    def generate(self, inputs, sampling_params, use_tqdm):
        assert not use_tqdm
        self.inputs += inputs
        outputs = [said(one.seed, one.temperature, one.max_tokens) for one in sampling_params]
        assert {(one.top_k, one.top_p, one.repetition_penalty, one.n) for one in sampling_params} == {(0, 1.0, 1.0, 1)}
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens))]) for tokens in outputs]


class Generation(VLLMGeneration):
    """TRL's class with its own arguments, and without vLLM behind it."""

    def _init_vllm(self):
        self.synced = []
        if self.mode == "server":
            self.vllm_client = Client(self.server_base_url or f"http://{self.server_host}:{self.server_port}")
        else:
            self.llm = Engine()

    def sync_weights(self):
        # What vLLM would get is read from the policy, under its names.
        self.synced.append({name: value.clone() for name, value in self._iter_named_params()})


def install(monkeypatch):
    """Lets the package find vLLM."""
    monkeypatch.setattr(Client, "made", [])
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm, "VLLMGeneration", Generation)
    monkeypatch.setattr(vllm, "VLLMClient", Client)
    stand_in = ModuleType("vllm")
    stand_in.SamplingParams = lambda **settings: SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
