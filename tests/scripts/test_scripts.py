"""Each script trains a tiny model on rows of a user's own, in every form of data and in both forms of messages."""

import json
import math
import re
from dataclasses import fields

import pytest
import torch
from accelerate import PartialState
from datasets import load_dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from tests import families
from tests.data.converters.helpers import image_folder, llava_conversations
from tests.forks import fork_group
from tests.hub import ScriptedHub
from tests.scripts.helpers import losses, options, write
from trl_vlm import DPOConfig, DPOTrainer
from trl_vlm.data.converters import Source, convert
from trl_vlm.data.model_check import ModelCheck
from trl_vlm.pairs import BDHS, Judged, SentenceEncoder
from trl_vlm.scripts import bdhs, dpo, grpo, online_dpo, ppo, reward, rloo, sft
from trl_vlm.scripts.arguments import ScriptArguments
from trl_vlm.scripts.expected import expected_memory
from trl_vlm.scripts.job import options_of, prepared
from trl_vlm.scripts.sources import source_arguments, source_from

pytestmark = pytest.mark.slow

PAIRS = ("images", "prompt", "chosen", "rejected", "facts")
LORA = ("--use_peft", "--lora_target_modules", "all-linear", "--lora_r", "4")


@pytest.fixture(scope="module")
def model():
    return families.saved("llava", sharp=4.0)


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved", "folder"])
def test_dpo_trains_on_every_form_of_data_alike(tmp_path, model, form):
    data = write(tmp_path, form, PAIRS)
    dpo.main(options(model, data, tmp_path / "out", "--max_length", "None"))
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert json.loads((tmp_path / "out" / "done.json").read_text()) == {"steps": 2}
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_stream_trains_with_max_steps_and_says_that_it_needs_them(tmp_path, model, capsys):
    data = write(tmp_path, "parquet", PAIRS)
    streamed = options(model, data, tmp_path / "out", "--dataset_streaming", "--max_length", "None")
    dpo.main(streamed)
    assert len(losses(tmp_path / "out")) == 2
    with pytest.raises(SystemExit, match="A stream has no length: give `--max_steps`"):
        dpo.main([*options(model, data, tmp_path / "other", "--dataset_streaming"), "--max_steps", "-1"])


@pytest.mark.parametrize("parts", [False, True], ids=["strings", "parts"])
def test_dense_dpo_is_a_matter_of_options(tmp_path, model, parts):
    data = write(tmp_path, "parquet", PAIRS, parts=parts)
    dense = ("--dense_preset", "paper", "--eval_strategy", "steps", "--eval_steps", "1", *LORA)
    dpo.main(options(model, data, tmp_path / "out", "--max_length", "None", "--eval_dataset_name", data, *dense))
    log = json.loads((tmp_path / "out" / "history.json").read_text())
    assert any("dense/changed_share" in entry for entry in log) and any("eval_loss" in entry for entry in log)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("parts", [False, True], ids=["strings", "parts"])
def test_sft_trains_and_leaves_the_vision_tower_alone(tmp_path, model, parts):
    data = write(tmp_path, "parquet", ("images", "prompt", "completion"), parts=parts)
    sft.main(options(model, data, tmp_path / "out", "--max_length", "None", "--freeze_vision_tower"))
    assert len(losses(tmp_path / "out")) == 2
    before, after = (weights(folder) for folder in (model, tmp_path / "out"))
    tower = [name for name in before if "vision_tower" in name]
    assert tower and all(before[name].equal(after[name]) for name in tower)
    assert any(not before[name].equal(after[name]) for name in before)


def test_sft_trains_on_whole_conversations_that_convert_wrote(tmp_path, model):
    images = image_folder(tmp_path / "images", "000000333333.jpg")
    (tmp_path / "talks.json").write_text(json.dumps([llava_conversations()] * 4))
    source, data = Source(str(tmp_path / "talks.json")), tmp_path / "rows.parquet"
    convert("llava-conversations", source, data, images=images, turns="all", progress=False)
    sft.main(options(model, str(data), tmp_path / "out", "--max_length", "None", "--assistant_only_loss"))
    assert len(losses(tmp_path / "out")) == 2


@pytest.mark.parametrize("script", [sft, grpo, rloo])
def test_what_trains_of_a_model_is_an_option_of_trls_methods_too(script, tmp_path):
    given = ["--output_dir", str(tmp_path), "--projector_learning_rate", "1e-5", "--freeze_vision_tower"]
    _, training, _ = script.make_parser().parse_args_and_config(given)
    assert (training.projector_learning_rate, training.freeze_vision_tower) == (1e-5, True)


def weights(folder):
    return dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, model):
    """A reward model that the script has trained, on rows of strings."""
    folder = tmp_path_factory.mktemp("reward")
    data = write(folder, "parquet", PAIRS)
    reward.main(options(model, data, folder / "out"))
    return folder / "out"


def test_a_reward_model_is_trained_and_scores(reward_model):
    log = json.loads((reward_model / "history.json").read_text())
    assert len(losses(reward_model)) == 2 and any("accuracy" in entry for entry in log)


@pytest.mark.parametrize("parts", [False, True], ids=["strings", "parts"])
def test_ppo_starts_from_a_reward_model_and_its_plan_counts_rollouts(tmp_path, model, reward_model, parts, caplog):
    data = write(tmp_path, "parquet", ("images", "prompt", "facts"), parts=parts)
    caplog.set_level("INFO")
    rollouts = ("--max_completion_length", "4", "--num_mini_batches", "2", "--num_ppo_epochs", "1")
    judge = ("--reward_model_name_or_path", str(reward_model), "--missing_eos_penalty", "1")
    ppo.main(options(model, data, tmp_path / "out", *rollouts, *judge))
    assert "8 rows, 0.5 epochs, 2 steps of 2 replies" in caplog.text
    assert "rollouts of 4 replies to 4 prompts, 2 steps each" in caplog.text
    log = json.loads((tmp_path / "out" / "history.json").read_text())
    assert any("ppo/score" in entry for entry in log)


@pytest.mark.parametrize("script", [grpo, rloo], ids=["grpo", "rloo"])
def test_trls_rollout_methods_read_images_and_facts_through_the_reward_model(tmp_path, model, reward_model, script):
    data = write(tmp_path, "parquet", ("images", "prompt", "facts"))
    judge = ("--reward_model_name_or_path", str(reward_model), "--reward_funcs", "tests.scripts.test_scripts.short")
    script.main(
        options(model, data, tmp_path / "out", "--max_completion_length", "4", "--num_generations", "2", *judge)
    )
    log = json.loads((tmp_path / "out" / "history.json").read_text())
    assert any("rewards/short/mean" in entry for entry in log)


def short(completions, **columns):
    return [-float(len(reply[0]["content"])) for reply in completions]


def test_bdhs_makes_rejected_replies_at_every_step(tmp_path, model, monkeypatch):
    monkeypatch.setattr(SentenceEncoder, "__call__", lambda encoder, texts, others: [0.5] * len(texts))
    data = write(tmp_path, "parquet", ("images", "prompt", "completion"))
    bdhs.main(options(model, data, tmp_path / "out", "--max_length", "None", "--max_new_tokens", "4"))
    log = json.loads((tmp_path / "out" / "history.json").read_text())
    assert log[0]["pairs/masked_ratio"] > 0.5


def test_online_dpo_asks_a_reward_model_which_reply_is_better(tmp_path, model, reward_model):
    data = write(tmp_path, "parquet", ("images", "prompt"))
    judge = ("--reward_model", str(reward_model), "--max_new_tokens", "4")
    online_dpo.main(options(model, data, tmp_path / "out", "--max_length", "None", *judge))
    log = json.loads((tmp_path / "out" / "history.json").read_text())
    assert "pairs/undecided" in log[0]


def test_the_total_batch_size_sets_the_accumulation(tmp_path, model, caplog):
    data = write(tmp_path, "parquet", PAIRS)
    caplog.set_level("INFO")
    dpo.main(options(model, data, tmp_path / "out", "--max_length", "None", "--total_batch_size", "4"))
    assert "8 rows, 1 epochs, 2 steps of 4 pairs (2 x 2 accumulated x 1 device(s))" in caplog.text
    assert json.loads((tmp_path / "out" / "history.json").read_text())[-1]["epoch"] == 1.0
    with pytest.raises(SystemExit, match="A batch of 5 cannot be divided into micro-batches of 2 on 1 device"):
        dpo.main(options(model, data, tmp_path / "other", "--total_batch_size", "5"))


def test_the_plan_of_epochs_is_what_the_trainer_does(tmp_path, model, caplog):
    data = write(tmp_path, "parquet", PAIRS, count=7)
    caplog.set_level("INFO")
    epochs = options(model, data, tmp_path / "out", "--max_length", "None", "--gradient_accumulation_steps", "2")
    dpo.main([*epochs, "--max_steps", "-1", "--num_train_epochs", "2"])
    assert "7 rows, 2 epochs, 4 steps of 4 pairs" in caplog.text
    assert json.loads((tmp_path / "out" / "done.json").read_text()) == {"steps": 4}


def memory_of(caplog):
    """GiB of each part that the plan expects; the tiny models have thousandths."""
    (line,) = re.findall(r": about [\d.]+ GiB \((.*?)\) on each device, an estimate", caplog.text)
    return [part.rsplit(" ", 1)[0] for part in line.split(", ")]


def test_the_plan_expects_tokens_and_memory_of_every_model_of_the_run(tmp_path, model, reward_model, caplog):
    caplog.set_level("INFO")
    data, dry = write(tmp_path, "parquet", PAIRS), ("--dry_run",)
    encoded = ModelCheck(str(model), "dpo")
    for row in load_dataset("parquet", data_files=data, split="train"):
        encoded(row)
    dpo.main(options(model, data, tmp_path / "dpo", "--max_length", "None", *dry))
    longest = encoded.tokens_per_row.most
    assert (
        f"4 sequences of at most about {longest} tokens on a device at once (the longest of the first" in caplog.text
    )
    assert memory_of(caplog) == ["policy", "reference", "activations"]
    caplog.clear()
    dpo.main(options(model, data, tmp_path / "lora", "--max_length", "None", *dry, *LORA))
    assert memory_of(caplog) == ["policy", "activations"]
    caplog.clear()
    judge = ("--reward_model_name_or_path", str(reward_model), "--max_completion_length", "100")
    ppo.main(options(model, data, tmp_path / "ppo", *judge, *dry))
    prompts = ModelCheck(str(model), "ppo")
    prompts(load_dataset("parquet", data_files=data, split="train")[0])
    assert f"2 sequences of at most about {prompts.tokens[0] + 100} tokens" in caplog.text
    sampling = "or keys and values of sampled replies"
    assert memory_of(caplog) == ["policy", "critic", "reference", "reward model", "activations", sampling]


def test_the_expected_memory_is_that_of_the_models_of_the_trainer(tmp_path, model):
    data = write(tmp_path, "parquet", PAIRS)
    for more in ((), LORA, ("--freeze_vision_tower",)):
        given = options(model, data, tmp_path / f"out{len(more)}", "--max_length", "None", *more)
        job = prepared(*options_of(dpo.make_parser(), given), purpose="dpo", unit="pairs")
        policy, *_ = expected_memory(job, None).roles
        trainer = DPOTrainer(job.model_name, **job.trainer_arguments)
        parameters = list(trainer.model.parameters())
        assert policy.weights == sum(p.numel() * p.element_size() for p in parameters)
        assert policy.gradients == sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def test_a_dry_run_checks_and_trains_nothing(tmp_path, model, caplog):
    data = write(tmp_path, "parquet", PAIRS)
    caplog.set_level("INFO")
    dpo.main(options(model, data, tmp_path / "out", "--dry_run", "--learning_rate", "1e-6", *LORA))
    assert "2 steps of 2 pairs" in caplog.text and "LoRA needs about ten times as much" in caplog.text
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.distributed
def test_the_processes_of_a_script_leave_their_group_at_its_end(tmp_path, model):
    given = options(model, write(tmp_path, "folder", PAIRS), tmp_path / "out", "--use_cpu", "True")

    def work(*more):
        dpo.main([*given, *more])
        assert PartialState().num_processes == 2 and not torch.distributed.is_initialized()

    assert fork_group(lambda: work("--dry_run")) == [0, 0]
    assert fork_group(work) == [0, 0] and len(losses(tmp_path / "out")) == 2
    assert fork_group(work) == [0, 0]  # the finished run


@pytest.mark.parametrize(("source", "count"), [(BDHS, 12), (Judged, 20)])
def test_every_field_of_a_source_is_an_option_with_its_default(source, count):
    options = fields(source_arguments(source, DPOConfig))
    assert len(options) - len(fields(ScriptArguments)) >= count
    assert all(option.metadata["help"] for option in options)


def test_a_source_gets_the_values_of_its_options():
    made = bdhs.make_parser().parse_args_and_config(["--output_dir", "out", "--pair_noise_steps", "300"])
    script, training = made[0], made[1]
    assert script.mask_ratio == 0.99 and script.pair_noise_steps == 300 and training.noise_steps == 500
    made = source_from(BDHS, script, DPOConfig, seed=3)
    assert (made.noise_steps, made.seed, repr(made.similarity)) == (300, 3, repr(SentenceEncoder()))


def test_a_pushed_model_has_a_card_that_names_no_folder(tmp_path, model, monkeypatch):
    """Method, papers, columns, how to load, the tag; TRL would write the path of local rows as a hub dataset."""
    hub = ScriptedHub(tmp_path / "hub").install(monkeypatch)
    data = write(tmp_path, "parquet", PAIRS)
    out = tmp_path / "out"
    dpo.main(options(model, data, out, "--max_length", "None", "--push_to_hub", "--hub_strategy", "end", *LORA))
    card = ModelCard.load(hub.folder("me/out") / "README.md")
    assert {"trl", "trl-vlm", "dpo"} <= set(card.data.tags) and card.data.datasets is None
    for words in (
        "Direct preference optimization",
        "2305.18290",
        "`chosen`",
        'PeftModel.from_pretrained(base, "me/out")',
    ):
        assert words in card.text, words
    assert str(tmp_path) not in card.content
