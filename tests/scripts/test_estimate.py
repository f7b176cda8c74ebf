"""`trl-vlm estimate`: published arithmetic at real sizes, layouts of the shipped configurations, and advice."""

import json
from pathlib import Path

import pytest
import transformers

from trl_vlm.cli.main import main, parser
from trl_vlm.models.memory import GIB
from trl_vlm.scripts.estimate import Lengths, estimate_of, report, smaller

TOWER = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
TOWER |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
LANGUAGE = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LANGUAGE |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064}
LORA = ("--use_peft", "--lora_target_modules", "language-model", "--lora_r", "64")
QLORA = (*LORA, "--load_in_4bit")

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """LLaVA-1.5-7B, its configuration alone."""
    folder = tmp_path_factory.mktemp("llava-1.5-7b")
    config = transformers.LlavaConfig(vision_config=TOWER, text_config=LANGUAGE, image_token_id=32000)
    config.save_pretrained(folder)
    return str(folder)


def estimate(script, model, *more, tokens=None, **known):
    lengths = Lengths(tokens, **known) if known else tokens or 1024
    return estimate_of(f"trl_vlm.scripts.{script}", ["--model_name_or_path", model, *more], lengths)


def held(found):
    """GiB of all models, without activations."""
    return sum(role.total for role in found.memory.roles) / GIB


def test_lora_and_qlora_of_a_7b_cost_what_arithmetic_says(llava):
    assert held(estimate("dpo", llava, *LORA)) == pytest.approx(15.5, abs=0.1)
    assert held(estimate("dpo", llava, *QLORA)) == pytest.approx(6.7, abs=0.3)
    shared = estimate("ppo", llava, *QLORA, "--share_base", "True")
    assert held(shared) == pytest.approx(9.8, abs=1.0)  # without a reward model, an adapter of 0.6 GiB
    assert [role.name for role in shared.memory.roles] == ["policy", "critic"]


def test_all_weights_have_a_reference_and_zero_3_splits_everything(llava):
    alone = estimate("dpo", llava, "--accelerate_config", "ddp")
    assert [role.name for role in alone.memory.roles] == ["policy", "reference"]
    split = estimate("dpo", llava, "--accelerate_config", "zero3")
    policy, reference = split.memory.roles
    assert split.layout == (8, 3, True, True)
    assert policy.weights == reference.weights == pytest.approx(7.063e9 * 2 / 8, rel=1e-3)
    assert policy.optimizer == pytest.approx(7.063e9 * 12 / 8, rel=1e-3)  # float32 weights and two states


def test_flags_of_the_launcher_win_over_its_file(llava):
    found = estimate("dpo", llava, "--accelerate_config", "zero2", "--num_processes", "4", "--mixed_precision", "no")
    assert found.layout == (4, 2, True, False)
    assert estimate("dpo", llava, "--accelerate_config", "fsdp2").layout == (8, 3, False, True)
    assert estimate("dpo", llava).layout == (1, 0, False, True)


def test_activations_grow_with_tokens_and_rollouts_keep_keys_and_values(llava):
    short, long = (estimate("grpo", llava, *LORA, tokens=tokens).memory for tokens in (500, 1000))
    assert long.activations == pytest.approx(2 * short.activations, rel=0.05)
    replies = 8  # the default batch, accumulated once
    assert 1 < short.generation / (2 * 32 * 4096 * 2 * 500 * replies) < 1.2  # and one layer works on prompts
    assert long.generation == 2 * short.generation
    assert estimate("dpo", llava, *LORA).memory.generation == 0


# Bytes of a token of LLaVA-1.5-7B in bfloat16 with LoRA in a layer: what norms (in float32), attention, and the gated
# feed-forward part keep; what its adapters read, a copy each. Keys and values; what a layer works with.
KEPT = 2 * 4 * 4096 + 2 * 4 * 4096 + 2 * 3 * 11008 + 2 * (6 * 4096 + 11008)
KEYS_AND_VALUES = 2 * 2 * 4096
WORKING = 2 * (2 * 11008 + 3 * 4096)
PLAIN = ("--gradient_checkpointing", "False", "--lora_dropout", "0")


def by_hand(computed, copied, read):
    """Bytes of 32 layers, and of a head that reads `read` tokens."""
    head = 2 * min(read, 4096) * 32064 + 4 * 4096 * read
    return 32 * (computed * KEPT + copied * KEYS_AND_VALUES) + computed * WORKING + head


def test_replies_to_a_row_compute_their_prompt_once_and_copy_its_keys(llava):
    options = (*LORA, *PLAIN, "--per_device_train_batch_size", "2")
    shared = estimate("dpo", llava, *options, prompt=600, reply=100, replies=3)
    assert shared.micro_batch == (6, 700, 600, 2) and shared.tokens == 700
    assert shared.memory.activations == by_hand(2 * 600 + 6 * 100, 6 * 600, 6 * 100)
    apart = estimate("dpo", llava, *options, "--share_prefix", "False", prompt=600, reply=100, replies=3)
    assert apart.memory.activations == by_hand(6 * 700, 0, 6 * 700)
    two = estimate("dpo", llava, *options, tokens=700).memory.activations  # nothing is known of a prompt
    assert two == by_hand(4 * 700, 0, 4 * 700)
    text = report(shared)
    assert "activations of 700 tokens a sequence" in text and "(6 replies to 2 of 600 tokens, computed once)" in text


def groups(llava, batch, *more, script="grpo", **lengths):
    """Sequences and prompts of a micro-batch."""
    options = (*LORA, "--per_device_train_batch_size", str(batch), "--generation_batch_size", "192", *more)
    found = estimate(script, llava, *options, **{"prompt": 600, "reply": 100} | lengths).micro_batch
    return found.sequences, found.prompts


def test_groups_compute_their_prompt_once_and_those_that_are_cut_once_in_each_part(llava):
    assert groups(llava, 8, "--num_generations", "4") == (8, 2)
    assert groups(llava, 2, "--num_generations", "8") == (2, 1)
    assert groups(llava, 6, "--num_generations", "4") == (6, 2)
    assert groups(llava, 3, "--num_generations", "8") == (3, 2)  # three of one, or one and two of two
    assert groups(llava, 8, "--num_generations", "4", script="rloo") == (8, 2)
    assert groups(llava, 8, "--num_generations", "4", script="ppo") == (8, 2)
    sampled = groups(llava, 8, "--num_generations", "4", "--max_completion_length", "100", reply=None)
    assert sampled == (8, 2)


def test_where_nothing_is_shared_each_reply_has_its_prompt(llava):
    assert groups(llava, 8, script="ppo") == (8, 0)  # one reply to each prompt
    assert groups(llava, 8, "--num_generations", "4", "--loss_type", "bnpo") == (8, 0)
    assert groups(llava, 8, "--num_generations", "4", "--torch_compile", "True") == (8, 0)
    assert estimate("sft", llava, *LORA, prompt=600, reply=100).micro_batch == (8, 700, 0, 0)
    assert estimate("reward", llava, *LORA, prompt=600, reply=100).micro_batch.prompts == 8
    assert estimate("dpo", llava, *LORA, prompt=2, reply=4000).micro_batch.prompts == 0  # it would take longer


@pytest.mark.parametrize(
    ("script", "lengths", "message"),
    [
        ("dpo", {"tokens": 700, "prompt": 600, "reply": 100}, "`--tokens` is prompt and reply together"),
        ("dpo", {"prompt": 600}, "Give `--prompt-tokens` and `--reply-tokens` together"),
        ("grpo", {"prompt": 600, "reply": 100, "replies": 4}, "The method's own option is `--num_generations`"),
        ("reward", {"prompt": 600, "reply": 100, "replies": 3}, "a row of DPO has two replies or more. Leave it out"),
        ("dpo", {"replies": 1}, "`--replies 1`: a row of DPO has two replies or more"),
    ],
)
def test_lengths_that_contradict_each_other_are_refused(llava, script, lengths, message):
    with pytest.raises(ValueError, match=message):
        estimate(script, llava, *LORA, **lengths)


def recipe(name):
    return ["--config", str(RECIPES / f"{name}.yaml")]


def test_qlora_ppo_of_a_7b_with_its_recipe_takes_less_than_16_gib(llava, tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": llava, "r": 64, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    given = [*recipe("methods/ppo"), *recipe("hardware/1x24gb"), "--reward_model_name_or_path", str(tmp_path)]
    found = estimate("ppo", llava, *given, tokens=900)
    assert found.training.gradient_accumulation_steps == 256 and found.training.steps_per_generation == 512
    memory = found.memory
    assert [role.name for role in memory.roles] == ["policy", "critic", "reward model"]
    assert memory.activations > GIB / 2 and memory.generation > 3 * GIB and memory.features == GIB
    assert 9 * GIB < memory.total < 16 * GIB
    at_once = estimate("ppo", llava, *given, "--sampling_batch_size", "512", tokens=900).memory
    assert at_once.total > 200 * GIB  # all keys and values of a rollout


def test_image_features_wait_for_further_passes_where_the_tower_is_frozen(llava):
    assert estimate("dpo", llava, *LORA, "--per_device_train_batch_size", "1", tokens=500).memory.features == (
        500 * 4096 * 2
    )
    assert estimate("dpo", llava, *LORA, "--image_feature_cache", "0").memory.features == 0
    assert estimate("dpo", llava, *LORA, "--image_features_on_cpu", "True").memory.features == 0
    assert estimate("dpo", llava).memory.features == 0  # the tower trains
    for split in ("zero3", "fsdp2"):
        assert estimate("dpo", llava, *LORA, "--accelerate_config", split).memory.features > 0


def test_a_total_batch_is_accumulated_over_the_devices(llava):
    given = ["--total_batch_size", "64", "--accelerate_config", "zero2", "--num_processes", "4"]
    found = estimate("dpo", llava, *LORA, *given, "--per_device_train_batch_size", "2")
    assert found.training.gradient_accumulation_steps == 8
    with pytest.raises(ValueError, match="A batch of 63 cannot be divided"):
        estimate("dpo", llava, *LORA, "--total_batch_size", "63", "--per_device_train_batch_size", "2")


def test_a_tower_that_trains_keeps_activations(llava):
    trains, frozen = (
        estimate("sft", llava, "--freeze_vision_tower", value, "--gradient_checkpointing", "False").memory
        for value in ("False", "True")
    )
    assert 4 * GIB < trains.activations - frozen.activations < 5 * GIB  # 8 images of 576 patches in 24 layers


def test_without_mixed_precision_values_are_those_of_the_weights(llava):
    half = estimate("dpo", llava, *LORA).memory
    single = estimate("dpo", llava, *LORA, "--dtype", "float32", "--bf16", "False").memory
    assert 1.3 < single.activations / half.activations < 2.2


def test_precision_is_that_of_a_gpu_unless_it_is_given(llava, tmp_path):
    (tmp_path / "run.yaml").write_text("dtype: float32\n")
    assert estimate("dpo", llava, *LORA, "--config", str(tmp_path / "run.yaml")).memory.roles[0].weights > 26 * GIB
    assert estimate("dpo", llava, *LORA, "--dtype", "float32").memory.roles[0].weights > 26 * GIB
    assert estimate("dpo", llava, *LORA).memory.roles[0].weights < 14 * GIB


def test_advice_stops_where_it_fits_and_each_step_saves(llava):
    found = estimate("dpo", llava, "--per_device_train_batch_size", "8", "--gradient_checkpointing", "False")
    peaks = [found.memory.total, *(changed.memory.total for _, changed in smaller(found))]
    assert peaks == sorted(peaks, reverse=True) and len(peaks) == 6
    text = report(found, 24)
    assert "It does not fit 24 GB: 20.3 GiB" in text
    assert text.splitlines()[-1].endswith(": fits") and text.count(": fits") == 1
    assert "zero3" not in text
    assert "It fits 96 GB" in report(estimate("dpo", llava, *QLORA), 96)
    assert "Take a smaller model" in report(estimate("dpo", llava, tokens=2_000_000), 8)


def test_the_command_prints_the_roles_and_names_wrong_options(llava, capsys):
    words = ["--model_name_or_path", llava, "--tokens", "700", "--gpu-memory", "24"]
    assert main(["estimate", "dpo", *words, *QLORA]) == 0
    printed = capsys.readouterr().out
    assert "policy" in printed and "700 tokens" in printed and "It fits 24 GB" in printed
    words = ["--model_name_or_path", llava, "--prompt-tokens", "600", "--reply-tokens", "100", "--replies", "3"]
    assert main(["estimate", "dpo", *words, *QLORA]) == 0
    assert "(24 replies to 8 of 600 tokens, computed once)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["estimate", "dpo", "--betta", "1"])
    assert "There is no option --betta" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["estimate", "dpo"])
    assert "`--model_name_or_path` is missing" in capsys.readouterr().err
