"""Tripwires: each private name that `models/_transformers.py` leans on, and each workaround still being needed.

A test that fails because upstream was mended says so: then the workaround can be deleted.
"""

import inspect

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import is_torchvision_available

from tests.families import FAMILIES, batch, build, image, load_processor, saved
from trl_vlm.models import _transformers
from trl_vlm.models.reward_model import RewardModel, load_reward_model, reward_model_class


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auto_classes_are_looked_up_by_config(family):
    config_class = type(transformers.AutoConfig.for_model(family))
    assert _transformers.reads_images(config_class)
    assert issubclass(_transformers.backbone_class(config_class), transformers.PreTrainedModel)
    assert issubclass(_transformers.processor_class(config_class), transformers.ProcessorMixin)


def test_text_models_and_encoder_decoders_are_left_to_transformers():
    served = AutoModelForSequenceClassification._model_mapping
    for config_class in (transformers.LlamaConfig, transformers.T5Gemma2Config):
        assert not _transformers.reads_images(config_class)
        assert not issubclass(served[config_class], RewardModel)
    assert _transformers.backbone_class(torch.nn.Module) is None


def test_the_table_of_classifiers_stays_open_to_others():
    class Config(transformers.LlamaConfig):
        model_type = "a_config_of_somebody_else"

    class Model(transformers.LlamaForSequenceClassification):
        config_class = Config

    AutoModelForSequenceClassification.register(Config, Model)
    assert AutoModelForSequenceClassification._model_mapping[Config] is Model
    assert isinstance(AutoModelForSequenceClassification._model_mapping._extra_content, dict)
    del AutoModelForSequenceClassification._model_mapping._extra_content[Config]


def test_borrowed_names_are_still_needed():
    """A class outside transformers, without the borrowed names, leaves part of Qwen2-VL's backbone random."""
    config = transformers.AutoConfig.from_pretrained(saved("qwen2_vl"), num_labels=1)
    borrowing = reward_model_class(config)
    stranger = type("StrangerForSequenceClassification", borrowing.__bases__, {"config_class": type(config)})
    _, report = stranger.from_pretrained(saved("qwen2_vl"), config=config, output_loading_info=True)
    missing = set(report["missing_keys"]) - {"score.weight"}
    assert missing, "transformers now finds the names by itself: delete `borrow_key_names`"


def missing_besides_the_head(folder):
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=1)
    _, report = reward_model_class(config).from_pretrained(folder, config=config, output_loading_info=True)
    return set(report["missing_keys"]) - {"score.weight"}


class OneBatch(torch.utils.data.Dataset):
    """Eight rows that are all different, each a batch of its own."""

    def __init__(self, processor):
        self.rows = [batch(processor, [1], seed=seed) for seed in range(8)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        rows = self.rows[index]
        return {**rows, "labels": rows["input_ids"]}


def train(model, rows, folder, resume=None):
    """Four steps with a checkpoint after the second; returns the losses, those before `resume` as they were saved."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=lambda each: each[0])
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def load_policy(keep_names):
    model = transformers.AutoModelForImageTextToText.from_pretrained(saved("llava", sharp=2.0))
    assert model._weight_conversions, "from_pretrained no longer records its renamings: see `keep_parameter_names`"
    if keep_names:
        _transformers.keep_parameter_names(model)
    return model


@pytest.fixture(scope="module")
def policy_rows():
    return OneBatch(load_processor("llava"))


def test_a_resumed_run_equals_an_uninterrupted_one(policy_rows, tmp_path):
    whole = train(load_policy(True), policy_rows, tmp_path)
    resumed = train(load_policy(True), policy_rows, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert resumed == whole
    assert whole[2] < whole[0]


def test_a_checkpoint_with_names_as_in_memory_loads_everywhere(policy_rows, tmp_path):
    model = load_policy(True)
    model.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not missing_besides_the_head(tmp_path)


def test_keeping_names_is_still_needed(policy_rows, tmp_path):
    whole = train(load_policy(False), policy_rows, tmp_path)
    resumed = train(load_policy(False), policy_rows, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert resumed != whole, (
        "Trainer now resumes a llava: huggingface/transformers#43701 is fixed, delete `keep_parameter_names`"
    )


def test_a_resumed_reward_model_equals_an_uninterrupted_one(tmp_path):
    batches = OneBatch(load_processor("llava")).rows
    rows = [{**row, "labels": torch.tensor([float(place)])} for place, row in enumerate(batches)]
    folder = saved("llava", sharp=2.0)
    whole = train(load_reward_model(folder), rows, tmp_path)
    resumed = train(load_reward_model(folder), rows, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert resumed == whole


def test_4bit_layers_still_have_the_switch_that_is_turned_off():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64)
    assert layer.support_avx512bf16_for_cpu in (False, True)
    layer.support_avx512bf16_for_cpu = True
    _transformers.keep_4bit_layers_trainable(torch.nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False


def test_the_arithmetic_of_anyres_has_its_signature():
    method = transformers.LlavaNextProcessor._get_number_of_features
    assert list(inspect.signature(method).parameters) == ["self", "orig_height", "orig_width", "height", "width"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_method_that_counts_positions(family):
    model, processor = build(family)
    rows = batch(processor, [1, 0], padding_side="left")
    positions = _transformers.generation_positions(model, rows)
    assert positions.shape in (rows["input_ids"].shape, (4, *rows["input_ids"].shape))
    parameters = inspect.signature(model._prepare_position_ids_for_generation).parameters
    assert list(parameters) == ["inputs_tensor", "model_kwargs"]


def test_generate_still_counts_positions_on_the_mask():
    model, processor = build("llava", sharp=8)
    rows = batch(processor, [1])
    hidden = rows["input_ids"] == model.config.image_token_id
    rows["attention_mask"] = rows["attention_mask"].masked_fill(hidden, 0)
    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    forward = model(**rows).logits[:, -1]
    (generated,) = model.generate(**rows, **settings).logits
    assert (forward - generated).abs().max() > 1e-2, (
        "`generate` no longer moves positions where the mask has holes: see `generation_positions`"
    )


@pytest.mark.skipif(is_torchvision_available(), reason="the fault shows without torchvision only")
def test_auto_processor_still_wants_torchvision_for_images():
    with pytest.raises((OSError, ImportError), match="video"):
        transformers.AutoProcessor.from_pretrained(saved("qwen2_vl"))


def test_paligemma_still_refuses_replies():
    stock = transformers.PaliGemmaProcessor.from_pretrained(saved("paligemma"))
    with pytest.raises(ValueError, match="`images` are expected"):
        stock(text=["A red cat."], return_tensors="pt")
    beside = stock(text=["There is a dog.", "<image>It"], images=[[], [image()]], padding=True, return_tensors="pt")
    assert stock.tokenizer.bos_token_id in beside["input_ids"][0]
