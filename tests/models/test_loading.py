import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.families import batch, build, saved
from trl_vlm.models.loading import base_of, load_generative_model, load_generative_processor


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an adapter that changes something, without a processor; and the model with it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_generative_model(saved("llava"))
    model.name_or_path = str(saved("llava"))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder, model.eval()


def logits(model, processor):
    with torch.no_grad():
        return model.eval()(**batch(processor, [1, 0])).logits


def test_a_folder_with_all_weights_loads_as_it_is():
    model, processor = build("llava")
    found = load_generative_model(saved("llava"), dtype="float32")
    torch.testing.assert_close(logits(found, load_generative_processor(saved("llava"))), logits(model, processor))


def test_an_adapter_comes_with_its_base_model_and_processor(adapter):
    folder, model = adapter
    processor = load_generative_processor(folder)
    found = logits(load_generative_model(folder), processor)
    torch.testing.assert_close(found, logits(model, processor))
    assert not torch.allclose(found, logits(build("llava")[0], processor))


def test_an_adapter_whose_base_is_gone_says_where_it_was(adapter, tmp_path):
    folder, _ = adapter
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is an adapter of the model '/gone/model', which cannot be loaded"):
        load_generative_model(tmp_path)


def test_a_folder_without_a_processor_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Unrecognized model"):
        load_generative_processor(tmp_path)


def test_an_adapter_in_a_subfolder_comes_with_a_base_that_has_none(adapter, tmp_path):
    folder, model = adapter
    shutil.copytree(folder, tmp_path / "policy")
    assert base_of(tmp_path, subfolder="policy") == str(saved("llava"))
    processor = load_generative_processor(tmp_path, subfolder="policy")
    found = load_generative_model(tmp_path, subfolder="policy")
    torch.testing.assert_close(logits(found, processor), logits(model, processor))
