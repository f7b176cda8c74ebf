"""Run by `tests/distributed.py`: TRL's GRPOTrainer with a reward model, loaded after its arguments or served."""

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig, GRPOTrainer

from tests import families
from trl_vlm.models.unsharded import is_sharded
from trl_vlm.rewards import RemoteReward, RewardModelReward


def main(folder, trainer_arguments, reward_folder, policy_folder, address=None):
    config = GRPOConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, num_generations=2,
        max_completion_length=4, report_to=[], save_strategy="no", **trainer_arguments,
    )  # fmt: skip
    # Under ZeRO-3, from_pretrained would now split it.
    reward = RewardModelReward(reward_folder) if address is None else RemoteReward(address)
    prompt = [{"role": "user", "content": "What is in the image?"}]
    data = Dataset.from_dict(
        {"images": [[families.image(i)] for i in range(2)], "prompt": [prompt] * 2, "facts": [["a cat"]] * 2}
    )
    policy = AutoModelForImageTextToText.from_pretrained(policy_folder)
    trainer = GRPOTrainer(
        policy, reward, args=config, train_dataset=data, processing_class=families.load_processor(policy_folder)
    )
    trainer.train()
    reply = [{"role": "assistant", "content": "A cat."}]
    score = reward(prompts=[prompt], completions=[reply], images=[[families.image(0)]], facts=[["a cat"]])
    scores = trainer.accelerator.gather(torch.tensor(score)).tolist()
    return trainer, {
        "scores": scores,
        "steps": trainer.state.global_step,
        "policy_is_sharded": is_sharded(trainer.model),
    }
