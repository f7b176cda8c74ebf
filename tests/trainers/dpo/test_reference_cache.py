"""The reference on disk: equal to recomputation, whole or not there, refused when anything changed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

from tests.families import image, saved
from tests.trainers.dpo.helpers import lora, losses, make, rows, text_rows
from tests.trainers.dpo.test_averaged import OTHER, with_extra
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.trainers.dpo import reference_cache
from trl_vlm.trainers.dpo.reference_cache import ReferenceCache, fingerprint, image_digest, model_identity, reply_keys

pytestmark = pytest.mark.slow

SHORT = {"max_steps": 3}


def train(folder, cache=None, **options):
    return losses(make(DPOTrainer, DPOConfig, folder / "out", reference_cache=cache, **SHORT | options))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_losses_from_the_cache_equal_those_with_a_reference_model(family, tmp_path):
    wanted = train(tmp_path, family=family)
    assert_close(train(tmp_path, tmp_path / "cache", family=family), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"dense_preset": "paper"}, {"peft_config": lora()}, {"ld_alpha": 0.5}, {"data": text_rows}, {"extra": 1}],
)
def test_one_cache_serves_dense_weights_lora_text_and_more_replies(options, tmp_path):
    options = dict(options)
    if "data" in options:
        options["data"] = options["data"]()
    if options.pop("extra", None):
        options["data"] = with_extra(rows(), OTHER)
    wanted = train(tmp_path, **options)
    assert_close(train(tmp_path, tmp_path / "cache", **options), wanted, rtol=1e-5, atol=1e-6)


def test_no_reference_model_stays_and_a_second_run_computes_nothing(tmp_path):
    made = make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")
    assert made.ref_model is None
    shards = sorted((tmp_path / "cache").iterdir())
    times = [path.stat().st_mtime_ns for path in shards if path.suffix == ".safetensors"]
    again = make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache", dense_preset="paper")
    assert sorted((tmp_path / "cache").iterdir()) == shards
    assert [path.stat().st_mtime_ns for path in shards if path.suffix == ".safetensors"] == times
    assert len(again.data_collator.reference.__self__.log_probs) == 8  # two replies to each of four rows


def test_cached_numbers_equal_recomputation_whatever_the_batch(tmp_path):
    one, other = (
        make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / str(size), precompute_ref_batch_size=size)
        for size in (1, 4)
    )
    found, wanted = (made.data_collator.reference.__self__.log_probs for made in (one, other))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_close(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda: str(saved("llava", seed=1, sharp=4.0))}, "made with another model"),
        ({"max_length": lambda: 200}, "made with another settings"),
        ({"data": lambda: rows((1, 2, 1, 1))}, "made for other train data: 2 of 8 replies are not in it"),
    ],
)
def test_a_cache_for_something_else_is_refused(change, message, tmp_path):
    make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")
    changed = {name: value() for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache", **changed)


def test_a_changed_processor_is_refused(tmp_path):
    made = make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")
    made.processing_class.chat_template += " "
    made.ref_model, made.data_collator.reference = made.model, None
    with pytest.raises(ValueError, match="made with another processor"):
        made._fill_reference_cache()


def test_data_that_the_trainer_was_not_given_are_refused(tmp_path):
    made = make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="does not hold 2 of the 2 replies of a row"):
        made.evaluate(rows((2,)).map(lambda _: {"prompt": [{"role": "user", "content": "Other?"}]}))


def test_a_damaged_shard_is_named(tmp_path):
    make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"shard .*{shard.name} .* is damaged .* Delete this file"):
        make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")


WRITER = """
import sys, torch
from trl_vlm.trainers.dpo import reference_cache
from trl_vlm.trainers.dpo.reference_cache import ReferenceCache
cache = ReferenceCache(sys.argv[1], {"model": "m"})
for shard in range(100_000):
    cache.write({f"{shard}-{row}": torch.full((50,), float(shard)) for row in range(200)})
    print(shard, flush=True)
"""


def test_a_cache_survives_being_killed_while_it_is_written(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    for _ in range(20):
        written = int(writer.stdout.readline())
    time.sleep(0.003)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    cache = ReferenceCache(tmp_path, {"model": "m"})
    cache.read()
    assert len(cache.log_probs) >= 200 * written
    for key, value in cache.log_probs.items():
        assert_close(value, torch.full((50,), float(key.split("-")[0])))


def test_an_interrupted_cache_is_completed_and_not_begun_anew(tmp_path):
    make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache", data=rows((1, 2)))
    # What a run that was killed leaves: shards, and no word that they are complete.
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"complete": {}}))
    before = {path.name for path in (tmp_path / "cache").glob("*.safetensors")}
    made = make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache", data=rows())
    after = {path.name for path in (tmp_path / "cache").glob("*.safetensors")}
    assert before < after and len(after) == 2
    assert len(made.data_collator.reference.__self__.log_probs) == 8


def test_keys_tell_images_prompts_and_replies_apart():
    row = {"images": [image(0)], "prompt": "p", "chosen": "a", "rejected": "b"}
    keys = reply_keys(row)
    assert len(set(keys)) == 2
    assert reply_keys(row | {"images": [image(0)]}) == keys
    assert reply_keys(row | {"chosen": "c"})[1] == keys[1]
    for change in ({"images": [image(1)]}, {"images": []}, {"prompt": "q"}, {"tools": ["t"]}):
        assert not set(reply_keys(row | change)) & set(keys), change


def test_keys_are_made_of_the_stored_bytes_and_nothing_is_decoded(tmp_path, monkeypatch):
    def decodes(*_, **__):
        raise AssertionError("an image was decoded")

    path = tmp_path / "0.png"
    image(0).save(path)
    monkeypatch.setattr("PIL.Image.open", decodes)
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    stored = {"bytes": path.read_bytes(), "path": "0.png"}
    forms = [path, str(path), path.read_bytes(), stored, {"bytes": None, "path": str(path)}]
    keys = [reply_keys(row | {"images": [form]}) for form in forms]
    assert keys == [keys[0]] * 5 and reply_keys(row | {"image": stored}) == keys[0]
    path.write_bytes(b"other")
    assert reply_keys(row | {"images": [path]}) != keys[0]


def test_an_image_of_an_unknown_kind_cannot_be_hashed():
    with pytest.raises(TypeError, match="came as int, which cannot be hashed"):
        image_digest(3)


def test_a_second_start_with_a_full_cache_reads_no_row(tmp_path, monkeypatch):
    make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")
    hashed = []
    monkeypatch.setattr(reference_cache, "reply_keys", lambda *given: hashed.append(given) or reply_keys(*given))
    again = make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")
    assert not hashed and len(again.data_collator.reference.__self__.log_probs) == 8
    (kept,) = (tmp_path / "cache").glob("keys-*.json")
    kept.write_text(kept.read_text()[:-9])
    make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")
    assert len(hashed) == 4


def test_an_empty_name_of_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`reference_cache` is empty"):
        DPOConfig(str(tmp_path), reference_cache="", use_cpu=True, bf16=False)


def test_a_folder_that_another_node_does_not_see_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "gather_object", lambda seen: [*seen, False])
    with pytest.raises(ValueError, match=r"The processes \[1\] do not see .* storage that all nodes share"):
        make(DPOTrainer, DPOConfig, tmp_path, reference_cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("probe-*"))


def test_what_a_killed_write_left_is_removed_at_the_next_start(tmp_path):
    left = tmp_path / f".a.safetensors.{socket.gethostname()}.{2**22 + 5}-1.tmp"
    left.touch()
    ReferenceCache(tmp_path, {"model": "m"})
    assert not left.exists()


def test_parameters_of_fsdp2_have_the_fingerprint_of_whole_ones(tmp_path):
    weight = torch.arange(12.0).view(4, 3)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        assert fingerprint([("w", distribute_tensor(weight, mesh, [Shard(0)]))]) == fingerprint([("w", weight)])
    finally:
        torch.distributed.destroy_process_group()


def test_a_fingerprint_sees_one_weight_and_not_the_order(tmp_path):
    weights = {"a": torch.zeros(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}
    found = fingerprint(weights.items())
    assert fingerprint(reversed(weights.items())) == found
    weights["a"][1, 1] = 1e-30
    assert fingerprint(weights.items()) != found


def test_an_adapter_for_training_does_not_change_the_model_and_a_trained_one_does(tmp_path):
    from peft import get_peft_model
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(saved("llava", sharp=4.0))
    bare = model_identity(model)
    peft = get_peft_model(model, lora())
    assert model_identity(peft) == bare
    peft.add_adapter("ref", peft.peft_config["default"])
    trained = model_identity(peft)
    assert trained["model"] == bare["model"]
    assert trained["adapter"] != bare["adapter"] == "none"
