"""Samples by vLLM, which cannot run here: a stand-in of the same form, and TRL's own classes as they are."""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import trl
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from tests.families import load_processor
from tests.trainers.dpo.helpers import logs, make, rows
from tests.trainers.dpo.test_pair_callback import refreshed
from tests.vllm_stand_in import install, said
from trl_vlm import DPOConfig, DPOTrainer, PairSourceCallback
from trl_vlm.judges import ScriptedJudge
from trl_vlm.pairs import BDHS, CombinedRejected, DatasetPairs, Judged, MixedPairs, SelfSamples, VLLMOptions
from trl_vlm.pairs.vllm import VLLMSampling

pytestmark = pytest.mark.slow

LONGER = ScriptedJudge(lambda pair: int(len(pair.second) > len(pair.first)))


@pytest.fixture
def installed(monkeypatch):
    install(monkeypatch)


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
    client = engine._sampler
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
    monkeypatch.setattr(engine, "_sampled", lambda prompts, *_: [[70, engine._ends[0], 71]] * len(prompts))
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


@pytest.mark.parametrize("kind", [(DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)], ids=["ours", "trl"])
@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_pairs_that_are_refreshed_come_from_vllm_with_the_weights_of_their_step(installed, kind, mode, tmp_path):
    where = VLLMOptions(use_vllm=True, vllm_mode=mode)
    source = SelfSamples(max_new_tokens=4)
    trainer = refreshed(kind, tmp_path, source, every_steps=2, max_steps=4, vllm=where, learning_rate=1e-2)
    assert len(logs(trainer)) == 4
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, PairSourceCallback))
    synced = callback.engine._generation.synced
    name = next(name for name in synced[0] if name.endswith("lm_head.weight"))
    assert len(synced) == 2 and not synced[0][name].equal(synced[1][name])
    rejected = {row["rejected"][0]["content"] for row in trainer.train_dataset}
    decode = load_processor("llava").decode
    assert rejected <= {decode(said(seed, 1.0, 4), skip_special_tokens=True).strip() for seed in range(2**6)}


def test_refreshed_pairs_are_vllms_only_where_it_can_make_them(installed, tmp_path, monkeypatch):
    where = VLLMOptions(use_vllm=True)
    with pytest.raises(ValueError, match="`use_vllm` has no effect: .* takes no samples from it"):
        refreshed((DPOTrainer, DPOConfig), tmp_path, DatasetPairs(), vllm=where)
    monkeypatch.undo()
    with pytest.raises(ImportError, match="`use_vllm` needs vLLM, which is not installed"):
        refreshed((DPOTrainer, DPOConfig), tmp_path, SelfSamples(), vllm=where)
    assert PairSourceCallback(SelfSamples(), make(DPOTrainer, DPOConfig, tmp_path), vllm=VLLMOptions()).engine is None


def test_the_options_have_the_names_and_defaults_of_trls():
    theirs = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(VLLMOptions)}
    assert ours == {name: theirs[name] for name in ours}
    of_a_policy_that_stays = {field.name: field.default for field in dataclasses.fields(VLLMSampling)}
    assert of_a_policy_that_stays.pop("vllm_gpu_memory_utilization") == 0.9  # nothing else is on the GPU
    assert of_a_policy_that_stays == {name: theirs[name] for name in of_a_policy_that_stays}


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
