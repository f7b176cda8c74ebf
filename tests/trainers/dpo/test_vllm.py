"""Samples by vLLM, which cannot run here: a stand-in of the same form, and TRL's own classes as they are."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from tests.families import load_processor
from tests.trainers.dpo.helpers import logs, make, rows
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.judges import ScriptedJudge
from trl_vlm.pairs import BDHS, CombinedRejected, DatasetPairs, Judged, MixedPairs, SelfSamples
from trl_vlm.trainers.dpo import vllm

pytestmark = pytest.mark.slow

LONGER = ScriptedJudge(lambda pair: int(len(pair.second) > len(pair.first)))
WORDS = [70, 71, 72, 73, 74, 75, 76, 77]


def said(seed, temperature, max_tokens):
    """Tokens that depend on the seed alone."""
    return [WORDS[(seed >> place) % len(WORDS)] for place in range(max_tokens)]


class Client:
    """A server's client: as many calls at once as there are requests."""

    def __init__(self, base_url=None, connection_timeout=0.0):
        self.base_url, self.timeout, self.requests, self.images = base_url, connection_timeout, [], []

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


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm, "VLLMGeneration", Generation)
    monkeypatch.setattr(vllm, "VLLMClient", Client)
    stand_in = ModuleType("vllm")
    stand_in.SamplingParams = lambda **settings: SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)


def online(tmp_path, source, **options):
    data = rows((1, 2, 0, 1)).rename_column("chosen", "completion")
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **options}
    return make(DPOTrainer, DPOConfig, tmp_path, data=data, pair_source=source, use_vllm=True, **options)


@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("source", [SelfSamples(max_new_tokens=4), Judged(LONGER, max_new_tokens=4)])
def test_samples_come_from_vllm_which_gets_the_weights_once_per_step(installed, mode, source, tmp_path):
    made = []
    trainer = online(tmp_path, source, vllm_mode=mode, learning_rate=1e-2)
    maker = trainer._pair_maker
    maker.source = lambda *given: made.append(source(*given)) or made[-1]
    assert len(logs(trainer)) == 3
    synced = maker.engine._generation.synced
    assert len(synced) == 3
    name = next(name for name in synced[0] if name.endswith("lm_head.weight"))
    assert not synced[0][name].equal(synced[1][name])
    decode = load_processor("llava").decode
    texts = {decode(said(seed, 1.0, 4), skip_special_tokens=True).strip() for seed in range(2**6)}  # all that differ
    replies = {pair["rejected"][0]["content"] for step in made for pair in step if pair is not None}
    assert replies and replies <= texts


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_a_request_has_the_prompts_tokens_its_images_and_a_seed_of_its_own(installed, mode, tmp_path):
    trainer = online(tmp_path, Judged(LONGER, max_new_tokens=4, temperature=0.7), vllm_mode=mode)
    engine, processor = trainer._pair_maker.engine, trainer.processing_class
    first, *others = [trainer.train_dataset[place] for place in range(3)]
    data = [first, first, *others]  # a row comes once for each of its replies
    seeds = [5, 6, 7, 8]
    replies = engine.replies(data, [row["row_name"] for row in data], seeds=seeds, temperature=0.7, max_new_tokens=4)
    assert [reply.tokens for reply in replies] == [said(seed, 0.7, 4) for seed in seeds]
    assert not any(reply.is_finished for reply in replies)
    image = processor.image_token_id
    if mode == "colocate":
        inputs = engine._generation.llm.inputs
        images = [given.get("multi_modal_data", {"image": None})["image"] for given in inputs]
        assert [type(each) for each in images] == [type(images[0])] * 2 + [list, type(None)] and len(images[2]) == 2
        assert [image in given["prompt_token_ids"] for given in inputs] == [True, True, True, False]
        return
    client = engine._client
    requests = sorted(client.requests, key=lambda request: request[2])
    assert [seed for *_, seed, _ in requests] == seeds
    assert len(client.images) == 3  # a row's images are sent once for all its replies
    places = [None if features is None else features[0]["mm_placeholders"]["image"] for _, features, *_ in requests]
    assert [len(place or ()) for place in places] == [1, 1, 2, 0]
    (prompt,), place = requests[2][0], places[2]
    assert all(set(prompt[one["offset"] :][: one["length"]]) == {image} for one in place)
    settings = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert requests[0][3] == settings | {"max_tokens": 4}


def test_a_reply_ends_before_the_token_that_ends_it(installed, tmp_path, monkeypatch):
    trainer = online(tmp_path, SelfSamples(max_new_tokens=4))
    engine = trainer._pair_maker.engine
    monkeypatch.setattr(engine, "_from_engine", lambda prompts, *_: [[70, engine._ends[0], 71]] * len(prompts))
    (reply,) = engine.replies([trainer.train_dataset[0]], ["row"], seeds=[1], temperature=1.0, max_new_tokens=4)
    assert reply.tokens == [70] and reply.is_finished


def test_evaluation_takes_the_weights_of_its_step(installed, tmp_path):
    data = rows((1,)).rename_column("chosen", "completion").remove_columns("rejected")
    trainer = online(tmp_path, SelfSamples(max_new_tokens=4), eval_dataset=data, max_steps=1)
    trainer.evaluate()
    trainer.evaluate()
    assert len(trainer._pair_maker.engine._generation.synced) == 1


def test_without_vllm_a_sentence_says_how_to_get_it(tmp_path):
    with pytest.raises(ImportError, match="`use_vllm` needs vLLM, which is not installed .* unset `use_vllm`"):
        online(tmp_path, SelfSamples())


@pytest.mark.parametrize(
    "source", [BDHS(lambda texts, others: [0.0] * len(texts)), DatasetPairs(), lambda rows, policy, round=0: rows]
)
def test_a_source_that_takes_no_plain_samples_is_refused(installed, source, tmp_path):
    with pytest.raises(ValueError, match="`use_vllm` has no effect: .* takes no samples from it"):
        online(tmp_path, source)


@pytest.mark.parametrize("combine", [MixedPairs, CombinedRejected])
def test_a_mixture_with_a_source_that_does_is_taken(installed, combine, tmp_path):
    source = combine(DatasetPairs(), SelfSamples(max_new_tokens=4))
    assert online(tmp_path, source)._pair_maker.engine is not None


def test_vllm_without_a_source_and_an_unknown_mode_are_refused(installed, tmp_path):
    with pytest.raises(ValueError, match="`use_vllm` has no effect: there is no `pair_source`"):
        make(DPOTrainer, DPOConfig, tmp_path, use_vllm=True)
    with pytest.raises(ValueError, match="`vllm_mode` is 'other'; it must be one of colocate, server"):
        online(tmp_path, SelfSamples(), vllm_mode="other")


def test_trls_classes_take_what_they_get():
    """The stand-ins above have TRL's form."""
    ours = {"mode", "server_base_url", "group_port", "gpu_memory_utilization", "max_model_length", "model_impl"}
    assert ours <= {*inspect.signature(VLLMGeneration.__init__).parameters}
    assert {"base_url", "connection_timeout"} <= {*inspect.signature(VLLMClient.__init__).parameters}
    generate = inspect.signature(VLLMClient.generate)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "logprobs")
    generate.bind(None, [[1]], features=None, generation_kwargs={"seed": 1}, **dict.fromkeys(names))
    assert list(inspect.signature(VLLMClient.image_features).parameters)[:2] == ["self", "images"]
    placed = VLLMGeneration._place_features(
        SimpleNamespace(processing_class=SimpleNamespace(image_token_id=9)),
        {"mm_placeholders": {"image": [None, None]}},
        [1, 9, 9, 2, 9],
    )
    assert placed["mm_placeholders"]["image"] == [{"offset": 1, "length": 2}, {"offset": 4, "length": 1}]
