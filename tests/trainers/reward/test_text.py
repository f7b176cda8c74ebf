import pytest
import torch
import trl
from transformers import LlamaConfig, LlamaForCausalLM

from tests.preference_rows import preference_rows
from tests.trainers.reward.helpers import (
    LLAVA,
    SETTINGS,
    SHORT,
    config,
    losses,
    trained,
)
from trl_vlm import RewardConfig, RewardTrainer


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    tokenizer = LLAVA.tokenizer
    tokenizer.chat_template = LLAVA.chat_template
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **size))
    folder = tmp_path_factory.mktemp("text")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text_rows():
    return preference_rows([0] * 6).remove_columns(["images", "facts"])


class TestText:
    """A model that reads no images trains as with TRL."""

    def test_losses_and_logs_are_those_of_trl(self, text_model, text_rows, tmp_path):
        def logs(trainer_class, config_class):
            args = config_class(str(tmp_path), **SETTINGS, eval_strategy="steps", eval_steps=1)
            trainer = trainer_class(text_model, args, train_dataset=text_rows, eval_dataset=text_rows)
            trainer.train()
            timing = ("runtime", "per_second")
            return [{k: v for k, v in log.items() if not k.endswith(timing)} for log in trainer.state.log_history]

        ours = logs(RewardTrainer, RewardConfig)
        assert ours == logs(trl.RewardTrainer, trl.RewardConfig)
        assert sum("loss" in log for log in ours) == 2 and sum("eval_accuracy" in log for log in ours) == 2

    def test_the_mean_regulariser_works_on_text_too(self, text_model, text_rows, tmp_path):
        def first_loss(**changes):
            return losses(trained(RewardTrainer(text_model, config(tmp_path, **changes), train_dataset=text_rows)))[0]

        assert first_loss(mean_reward_coefficient=0.5) > first_loss()

    def test_options_for_images_are_refused(self, text_model, text_rows, tmp_path):
        with pytest.raises(
            ValueError, match=r"\['judge_template', 'freeze_vision_tower'\] are for models and rows with im"
        ):
            RewardTrainer(
                text_model, config(tmp_path, freeze_vision_tower=True), train_dataset=text_rows, judge_template=SHORT
            )
