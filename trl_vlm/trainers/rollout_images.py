"""Rows of rollouts: images stay stored until a batch is made, errors name their row; replies go to TensorBoard."""

from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from trl_vlm.trainers.ppo.rollout_rows import prepared_rows, refuse_mixed_rows, rollout_rows
from trl_vlm.trainers.preparation import PreparedTrainer
from trl_vlm.trainers.tables import log_to_tensorboard, rollout_table
from trl_vlm.trainers.types import EvaluationRows, Rows


class UndecodedRollouts(PreparedTrainer):
    """Keeps `datasets` from decoding images, which would open addresses and name no row: a mixin before TRL's."""

    def keep_images_undecoded(self, train_dataset: Rows | None, eval_dataset: EvaluationRows | None) -> None:
        """Takes the place of the datasets; call it after TRL's constructor."""
        self.train_dataset = rollout_rows(train_dataset, "train")
        self.eval_dataset = rollout_rows(eval_dataset, "eval")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in TRL, also for a dataset that `evaluate` was given."""
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = rollout_rows(eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, Any]:
        trainer: Any = super()  # one of TRL's, which have no base for rollouts in common
        prompt_ids, images, multimodal_fields = trainer._tokenize_prompts(prompts)
        if images is not None:
            # TRL says None for a row without images in a batch that has some, and processors refuse it.
            # Delete when TRL trains on such batches: https://github.com/huggingface/trl/issues/6967.
            images = [row or [] for row in images]
        return prompt_ids, images, multimodal_fields

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = prepared_rows(inputs, self.processing_class)
        refuse_mixed_rows(rows, self)
        trainer: Any = super()
        return trainer._generate_and_score_completions(rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL, whose `log_completions` writes replies to W&B and Trackio; here to TensorBoard as well."""
        super().log(logs, start_time)
        trainer: Any = self
        if trainer.log_completions and self.is_world_process_zero() and trainer._logs["prompt"]:
            log_to_tensorboard(self, "completions", rollout_table(trainer._logs, self.state.global_step))
