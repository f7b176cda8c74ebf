"""One contract for all families, then what a reward model refuses."""

import copy
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForSequenceClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from tests.families import FAMILIES, batch, load_processor, saved
from trl_vlm.models import _transformers
from trl_vlm.models.parts import PARTS, part_of
from trl_vlm.models.reward_model import (
    RewardModel,
    ScoreHead,
    last_attended_token,
    load_reward_model,
    reward_model_class,
)

ROWS = [1, 2, 0]  # images per row


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A family's folder with sharp weights, its processor, a reward model made of it (not to be changed), a batch."""
    folder = saved(request.param, sharp=8.0)
    processor = load_processor(folder)
    return SimpleNamespace(
        folder=folder,
        processor=processor,
        model=load_reward_model(folder).eval(),
        rows=batch(processor, ROWS),
    )


@torch.no_grad()
def scores(model, inputs):
    return model.eval()(**inputs).logits.squeeze(-1)


def train_a_step(model, rows):
    """One large step that prefers the first row to the others; every part that trains moves."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    logits = model.train()(**rows, margin=torch.zeros(1)).logits.squeeze(-1)
    (-logsigmoid(logits[0] - logits[1:])).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class TestEveryFamily:
    def test_loads_a_generative_checkpoint_with_the_head_alone_missing(self, family):
        config = AutoConfig.from_pretrained(family.folder, num_labels=1)
        model, report = reward_model_class(config).from_pretrained(
            family.folder, config=config, output_loading_info=True
        )
        assert set(report["missing_keys"]) == {"score.weight"}
        published = AutoModelForImageTextToText.from_pretrained(family.folder).model.state_dict()
        loaded = model.model.state_dict()
        assert published.keys() == loaded.keys()
        assert all(torch.equal(weight, loaded[name]) for name, weight in published.items())

    def test_scores_the_last_attended_token(self, family):
        """Against the definition, row by row."""
        with torch.no_grad():
            hidden = family.model.model(**family.rows).last_hidden_state
        for row, score in enumerate(scores(family.model, family.rows)):
            last = max(place for place, real in enumerate(family.rows["attention_mask"][row]) if real)
            assert_close(score, hidden[row, last] @ family.model.score.weight[0])

    def test_padding_on_either_side_scores_the_same(self, family):
        left = batch(family.processor, ROWS, padding_side="left")
        assert not torch.equal(left["attention_mask"], family.rows["attention_mask"])
        assert_close(scores(family.model, left), scores(family.model, family.rows), atol=1e-6, rtol=0)

    def test_a_row_scores_the_same_alone_and_beside_others(self, family):
        alone = batch(family.processor, [ROWS[0]])
        assert_close(scores(family.model, alone), scores(family.model, family.rows)[:1], atol=2e-6, rtol=0)

    def test_scores_follow_the_pixels(self, family):
        change = scores(family.model, batch(family.processor, ROWS, seed=1)) - scores(family.model, family.rows)
        assert (change[:2].abs() > 1e-5).all(), change  # the rows with images; rounding is below 1e-7
        assert change[2] == 0  # the row without

    def test_reads_every_token_on_request(self, family):
        with torch.no_grad():
            output = family.model(**family.rows, output_token_scores=True)
        assert output.token_scores.shape == family.rows["input_ids"].shape
        last = family.rows["attention_mask"].sum(-1) - 1
        assert torch.equal(output.token_scores[torch.arange(3), last], output.logits.squeeze(-1))
        assert_close(output.logits.squeeze(-1), scores(family.model, family.rows))

    def test_every_part_trains_from_rows_with_one_two_and_no_images(self, family):
        model = copy.deepcopy(family.model)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        train_a_step(model, family.rows)
        moved = {part_of(name) for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        assert moved == set(PARTS)

    def test_a_trained_model_scores_the_same_after_saving(self, family, tmp_path):
        model = copy.deepcopy(family.model)
        train_a_step(model, family.rows)
        model.save_pretrained(tmp_path)
        family.processor.save_pretrained(tmp_path)
        expected = scores(model, family.rows)
        assert not torch.allclose(expected, scores(family.model, family.rows), atol=1e-4)
        assert_close(scores(load_reward_model(tmp_path, for_scoring=True), family.rows), expected, atol=1e-6, rtol=0)
        by_auto_class = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        rows = batch(load_processor(tmp_path), ROWS)
        assert_close(scores(by_auto_class, rows), expected, atol=1e-6, rtol=0)
        assert by_auto_class.config.architectures == [type(by_auto_class).__name__]

    def test_a_trained_adapter_scores_the_same_after_saving_and_trains_on(self, family, tmp_path):
        lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"])
        model = get_peft_model(load_reward_model(family.folder), lora)
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert [name for name in trained if "lora" not in name] == [
            "base_model.model.score.modules_to_save.default.weight"
        ]
        train_a_step(model, family.rows)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            family.folder
        )
        expected = scores(model, family.rows)
        assert not torch.allclose(expected, scores(family.model, family.rows), atol=1e-4)

        scoring = load_reward_model(tmp_path, for_scoring=True)
        assert_close(scores(scoring, family.rows), expected, atol=1e-6, rtol=0)
        assert not any(weight.requires_grad for weight in scoring.parameters())

        training = load_reward_model(tmp_path)
        assert [name for name, weight in training.named_parameters() if weight.requires_grad] == trained
        train_a_step(training, family.rows)
        assert not torch.allclose(scores(training, family.rows), expected, atol=1e-4)

    def test_gradient_checkpointing_changes_no_gradient(self, family):
        gradients = []
        for checkpointing in (False, True):
            model = copy.deepcopy(family.model).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(**family.rows).logits.sum().backward()
            gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) > 0
        for plain, recomputed in zip(*gradients, strict=True):
            assert_close(recomputed, plain, atol=1e-5, rtol=1e-4)

    def test_without_a_head_scoring_is_refused(self, family):
        with pytest.raises(ValueError, match=r"holds no reward head.*Train it first with `trl_vlm.RewardTrainer`"):
            load_reward_model(family.folder, for_scoring=True)


def test_the_last_attended_token_is_the_rightmost_one():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0]])
    assert last_attended_token(mask, torch.zeros(4, 4, 2)).tolist() == [1, 3, 2, 2]
    assert last_attended_token(None, torch.zeros(1, 4, 2)).tolist() == [3]


def test_a_real_token_equal_to_the_pad_id_is_read():
    """transformers' generic class looks for the last id that differs from the pad id, and reads the token before."""
    model, rows = load_reward_model(saved("llava")), batch(load_processor("llava"), [1])
    rows["input_ids"][0, -1] = model.config.text_config.pad_token_id
    with torch.no_grad():
        output = model(**rows, output_token_scores=True)
    assert output.logits[0, 0] == output.token_scores[0, -1] != output.token_scores[0, -2]


def test_a_batch_without_a_mask_is_refused():
    model, rows = load_reward_model(saved("llava")), batch(load_processor("llava"), [1, 1])
    with pytest.raises(ValueError, match="without `attention_mask`"):
        model(input_ids=rows["input_ids"], pixel_values=rows["pixel_values"])


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"needs the \(B, T\) mask"):
        last_attended_token(torch.ones(2, 1, 4, 4), torch.zeros(2, 4, 8))


def test_a_new_head_depends_on_its_seed_alone():
    heads = []
    for global_seed, head_seed in [(0, 0), (1, 0), (1, 1)]:
        torch.manual_seed(global_seed)
        heads.append(load_reward_model(saved("llava"), head_seed=head_seed).score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    assert heads[0].std().item() == pytest.approx(0.02, rel=0.3)  # transformers' initializer_range


def test_the_head_computes_in_float32_beside_a_bf16_backbone(tmp_path):
    model, rows = load_reward_model(saved("llava"), dtype=torch.bfloat16), batch(load_processor("llava"), ROWS)
    assert model.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32
    model.save_pretrained(tmp_path)
    reloaded = load_reward_model(tmp_path, for_scoring=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        reward = scores(reloaded, rows)
    assert reward.dtype == torch.float32
    assert not torch.equal(reward, reward.bfloat16().float())


def test_weights_other_than_the_head_must_not_be_missing(tmp_path):
    shutil.copytree(saved("llava"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if "language_model" in name and name.endswith("norm.weight"))]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights besides the head, the first being 'model.language_model"):
        load_reward_model(tmp_path)


def test_a_checkpoint_whose_names_are_not_understood_is_refused():
    """Without the borrowed names Qwen2-VL's backbone would stay random."""
    config = AutoConfig.from_pretrained(saved("qwen2_vl"))
    model_class = reward_model_class(config)
    register_checkpoint_conversion_mapping(model_class.__name__, [], overwrite=True)
    try:
        with pytest.raises(ValueError, match=r"lacks \d+ weights besides the head"):
            load_reward_model(saved("qwen2_vl"))
    finally:
        _transformers.borrow_key_names(model_class, type(config))
    load_reward_model(saved("qwen2_vl"))


def test_a_family_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match="no backbone without a generative head"):
        reward_model_class(transformers.VisionEncoderDecoderConfig)


def test_families_that_transformers_serves_get_our_reading():
    for config_class in (transformers.Gemma3Config, transformers.Qwen3_5Config):
        served = AutoModelForSequenceClassification._model_mapping[config_class]
        assert issubclass(served, RewardModel)
    native = AutoModelForSequenceClassification._model_mapping[transformers.LlamaConfig]
    assert native is transformers.LlamaForSequenceClassification


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of a reward model with a head that scores widely, its base in a folder that can move."""
    folder = tmp_path_factory.mktemp("adapter")
    base = shutil.copytree(saved("llava"), folder / "base")
    model = get_peft_model(load_reward_model(base), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(folder / "adapter")
    return SimpleNamespace(folder=folder / "adapter", base=base, model=model)


@pytest.fixture
def quantization():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def test_an_adapters_base_that_has_moved_can_be_named(adapter, tmp_path):
    moved = shutil.copytree(adapter.base, tmp_path / "moved")
    shutil.copytree(adapter.folder, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "nowhere/to-be-found"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"adapter of the model 'nowhere/to-be-found'.*`base_model`"):
        load_reward_model(tmp_path / "adapter", for_scoring=True)
    rows = batch(load_processor("llava"), ROWS)
    reloaded = load_reward_model(tmp_path / "adapter", for_scoring=True, base_model=moved)
    assert_close(scores(reloaded, rows), scores(adapter.model, rows))


def test_an_adapter_without_its_head_may_not_score(adapter, tmp_path):
    shutil.copytree(adapter.folder, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    headless = {name: weight for name, weight in weights.items() if "score" not in name}
    assert len(headless) == len(weights) - 1
    save_file(headless, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no reward head"):
        load_reward_model(tmp_path / "adapter", for_scoring=True)


def test_the_adapter_of_a_policy_is_refused(tmp_path):
    policy = AutoModelForImageTextToText.from_pretrained(saved("llava"))
    get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter of a CAUSAL_LM model.*merge it into its base first"):
        load_reward_model(tmp_path, for_scoring=True)


def test_4bit_loading_spares_the_head(quantization):
    for skipped in (None, ["model.vision_tower"]):
        quantization = copy.deepcopy(quantization)
        quantization.llm_int8_skip_modules = skipped
        model = load_reward_model(saved("llava", width=64), quantization_config=quantization)
        kinds = {type(module).__name__ for module in model.model.language_model.modules()}
        assert "Linear4bit" in kinds
        assert model.score.weight.dtype == torch.float32
        assert quantization.llm_int8_skip_modules == skipped  # the caller's object stays as it was


def test_4bit_layers_train_after_an_evaluation(quantization, tmp_path):
    """On CPUs with AVX512-BF16 this fails without `keep_4bit_layers_trainable`."""
    folder = saved("llava", width=64)
    rows = batch(load_processor(folder), ROWS)
    model = get_peft_model(
        load_reward_model(folder, quantization_config=quantization),
        LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"),
    )
    before = scores(model, rows)
    train_a_step(model, rows)
    after = scores(model, rows)
    assert not torch.allclose(before, after, atol=1e-5)
    model.save_pretrained(tmp_path)
    reloaded = load_reward_model(tmp_path, for_scoring=True, quantization_config=quantization)
    assert_close(scores(reloaded, rows), after, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_in_a_fresh_process_the_import_is_lazy_and_the_auto_class_loads_a_saved_model(tmp_path):
    model, rows = load_reward_model(saved("idefics3")), batch(load_processor("idefics3"), [0])
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch, trl_vlm.models.reward_model\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "made = [name for name in sys.modules if name.startswith('transformers.models.') and 'modeling_' in name]\n"
        "assert not [name for name in made if 'idefics3' in name or 'qwen2_vl' in name], made\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})\n"
        f"ids = torch.tensor({rows['input_ids'].tolist()})\n"
        "print(type(model).__name__, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, score = done.stdout.split()[-2:]
    assert name == "Idefics3ForSequenceClassification"
    assert float(score) == pytest.approx(scores(model, rows).item(), abs=1e-6)


def test_the_head_multiplies_in_float32_when_it_is_stored_in_bfloat16():
    """DeepSpeed, FSDP2 and QLoRA store all of a model in bfloat16; scores in it would be multiples of 1/128."""
    head = ScoreHead(32, 1, bias=False).to(torch.bfloat16)
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scores = head(hidden)
    assert scores.dtype == torch.float32
    assert_close(scores, hidden.float() @ head.weight.float().T, rtol=0, atol=0)
    assert (scores - scores.to(torch.bfloat16).float()).abs().max() > 1e-3
