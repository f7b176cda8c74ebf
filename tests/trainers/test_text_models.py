"""Language models without images train in our GRPO, RLOO and PPO as in TRL."""

import pytest
import torch
import transformers
import trl
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

import trl_vlm
from tests import families
from tests.trainers.group_helpers import logged, weights
from tests.trainers.ppo.helpers import count_letters, rows

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", params=["Llama", "Qwen2"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    processor = families.load_processor("llava")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=processor.tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        chat_template=processor.chat_template,
    )
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, f"{request.param}Config")(vocab_size=len(tokenizer), **SIZES, **special)
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # so that log-probabilities differ
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make(method, folder, output, module=trl_vlm, **options):
    settings = {
        **{"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6, "max_steps": 3},
        **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "logging_steps": 1},
        **{"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False},
        **{"save_strategy": "no", "disable_tqdm": True, "kl_coef" if method == "PPO" else "beta": 0.1},
    }
    return getattr(module, f"{method}Trainer")(
        folder,
        reward_funcs=count_letters,
        args=getattr(module, f"{method}Config")(output_dir=str(output), **settings, **options),
        train_dataset=rows([0, 0]).remove_columns("images"),
    )


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_a_language_model_trains_as_in_trl(method, folder, tmp_path, caplog):
    runs = []
    for module in (trl, trl_vlm):
        trainer = make(method, folder, tmp_path, module)
        start = weights(trainer)
        trainer.train()
        runs.append(trainer)
    theirs, ours = runs
    assert not ours.shares_groups and "Prompts are computed once per reply" not in caplog.text
    assert logged(theirs) == logged(ours) and logged(ours)["loss"]
    wanted, found = weights(theirs), weights(ours)
    assert max((wanted[name] - start[name]).abs().max() for name in wanted) > 1e-3
    for name, weight in wanted.items():
        assert_close(found[name], weight, rtol=0, atol=0, msg=name)


def test_ppo_trains_a_language_model_on_groups(folder, tmp_path):
    trainer = make("PPO", folder, tmp_path, num_ppo_epochs=2)
    start = weights(trainer)
    trainer.train()
    moved = weights(trainer)
    assert not trainer.shares_groups
    assert max((moved[name] - start[name]).abs().max() for name in start) > 1e-4
