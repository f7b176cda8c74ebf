"""Replies of a group share one pass through their prompt: what GRPO, RLOO and PPO have in common.

Three seams of TRL:

- `_get_per_token_logps_and_entropies` calls a model on the parts of a batch: for the policy, its old log-probabilities
  and the reference, and for PPO's values. It gets a callable that gives each part the prompts once.
- `_prepare_inputs` shuffles a rollout and cuts it into micro-batches. Then the replies of a prompt are put together
  again, in the order of the shuffle.
- The backbones of all models get the hooks of `share_prefix`.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import trl
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_vlm.models.families import family_of
from trl_vlm.models.prefix_sharing.sharing import needs_trial, share_prefix, why_not_shareable
from trl_vlm.trainers import preparation
from trl_vlm.trainers._trl import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid
from trl_vlm.trainers.options import GroupOptions
from trl_vlm.trainers.ppo.rollout_images import family_inputs, images_per_row
from trl_vlm.trainers.preparation import PreparedTrainer
from trl_vlm.trainers.rollout_forward import RolloutForward
from trl_vlm.trainers.types import base_model, unwrapped

logger = logging.getLogger(__name__)

# The key of a rollout that says to which prompt a row belongs, counted over all processes.
GROUP = "prompt_group"


class SharedGroups(PreparedTrainer):
    """Computes prompt and images once for the replies of a group: a mixin before TRL's trainer.

    Attributes:
        shares_groups: Whether it does.
        mends_reply_types: Whether replies get the token type of their family (PaliGemma) without sharing too; TRL
            gives them the prompt's.
    """

    args: GroupOptions
    aux_loss_enabled: bool
    num_generations: int
    ref_model: nn.Module | None
    _is_vlm: bool
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None

    shares_groups = False
    _tries = False
    mends_reply_types = False

    def share_groups(self, *further: nn.Module) -> None:
        """Lets policy and reference read each prompt once; call it at the end of the constructor.

        Args:
            further: More models that read rollouts.
        """
        self._say_whether_replies_see_later_tokens()
        if self.num_generations == 1:
            return
        models = [self._bare(self.model), *map(self._bare, further)]
        if self.ref_model is not None:
            models.append(self._bare(self.ref_model))
        reason = self._why_no_shared_groups(models)
        if reason is None:
            self._tries = self._tries_sharing(models)
            for model in models:
                share_prefix(model, is_tested=not self.args.use_liger_kernel)
            self.shares_groups = True
        if not self.accelerator.is_main_process:
            return
        if reason is None:
            self._say_where_groups_are_cut()
        elif self.args.share_prefix and self._is_vlm:
            logger.warning("Prompts are computed once per reply, not once per group: %s.", reason)

    def _say_whether_replies_see_later_tokens(self) -> None:
        config = self.model.config
        is_mended = self.args.share_prefix or self.mends_reply_types or not family_of(config).reply_type
        if self._is_vlm and not is_mended and self.accelerator.is_main_process:
            logger.warning(
                "TRL gives the replies of %s the token type of a prompt, all of which sees all of itself: the "
                "log-probability of each token is computed with the tokens after it in view, as generation never is. "
                "`share_prefix=False` keeps that; leave it on, and replies are read causally.",
                config.model_type,
            )

    def _bare(self, model: nn.Module) -> PreTrainedModel:
        bare = unwrapped(self.accelerator, model)
        assert isinstance(bare, PreTrainedModel | PeftModel)  # as TRL takes it
        return base_model(bare)

    def _why_no_shared_groups(self, models: list[PreTrainedModel]) -> str | None:
        """Why prompts are computed once per reply, as one sentence; None if the models can share them."""
        further = {
            "the auxiliary loss of mixtures of experts counts every token": self.aux_loss_enabled,
            # All processes come to a trial with their first replies, and those with images are read one by one.
            f"{self.model.config.model_type} is not tested with tools, which may return images": (
                self._tries_sharing(models) and bool(vars(self).get("tools"))
            ),
        }
        reason = preparation.why_no_shared_prefix(self.model, self.args, False, further)
        return reason or next(filter(None, (why_not_shareable(model.config) for model in models)), None)

    def _tries_sharing(self, models: list[PreTrainedModel]) -> bool:
        """Whether a first batch decides if a model shares."""
        return self.args.use_liger_kernel or any(needs_trial(model.config) for model in models)

    def _say_where_groups_are_cut(self) -> None:
        size = self.args.per_device_train_batch_size
        if size % self.num_generations:
            logger.warning(
                "A micro-batch of %d replies holds no whole number of groups of %d: the prompt of a group that is cut "
                "is computed once in each part. Set `per_device_train_batch_size` to a multiple of `num_generations` "
                "to compute it once.",
                size,
                self.num_generations,
            )

    def _get_per_token_logps_and_entropies(
        self,
        model: Callable[..., Any],
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Any]:
        config = self.model.config
        typed = logits_to_keep if self.args.share_prefix or self.mends_reply_types else 0
        kwargs = family_inputs(config, kwargs, typed)
        counts = {name: kwargs.get(name) for name in ("num_images", "num_tiles")}
        forward = RolloutForward(model, config, logits_to_keep, shares=self.shares_groups, tries=self._tries, **counts)
        trainer: Any = super()  # one of TRL's, which have no base for rollouts in common
        return trainer._get_per_token_logps_and_entropies(
            forward, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        trainer: Any = super()
        batch = trainer._generate_and_score_completions(inputs)
        if (counts := images_per_row(batch)) is not None:
            batch["num_images"] = counts
        if self.shares_groups and self.model.training:
            first = self.accelerator.process_index * len(inputs)
            batch[GROUP] = (torch.arange(len(inputs)) + first) // self.num_generations
        return batch

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        batches = self._buffered_inputs
        if batches is before or batches is None or GROUP not in batches[0] or depends_on_micro_batches(self.args):
            return inputs
        self._buffered_inputs = in_groups(batches)
        return self._buffered_inputs[self._step % len(batches)]


def depends_on_micro_batches(args: object) -> bool:
    """Whether a loss averages over a micro-batch, so that TRL's shuffle decides on its value."""
    if not isinstance(args, trl.GRPOConfig):
        return False
    has_entropy_bonus = args.entropy_coef != 0 or args.use_adaptive_entropy
    return args.loss_type == "bnpo" or has_entropy_bonus or args.top_entropy_quantile < 1


def in_groups(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Micro-batches with the rows of a group beside each other; the groups stay in the order of their first rows.

    Args:
        batches: As TRL buffers them, with `GROUP`; not modified.
    """
    if len(batches) == 1:
        return batches
    parts = [split_pixel_values_by_grid(batch) for batch in batches]
    whole = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    groups = whole[GROUP].tolist()
    place_of_group = {group: place for place, group in reversed(list(enumerate(groups)))}
    order = sorted(range(len(groups)), key=lambda row: place_of_group[groups[row]])  # a stable sort
    whole = {name: _reordered(values, order) for name, values in whole.items()}
    return [unsplit_pixel_values_by_grid(batch) for batch in split_tensor_dict(whole, len(batches))]


def _is_per_row(values: Any) -> bool:
    """A list, or a tensor that is no single number; TRL also keeps None."""
    return values is not None and (isinstance(values, list) or values.dim() > 0)


def _joined(values: list[Any]) -> Any:
    if not _is_per_row(values[0]):
        return values[0]
    if isinstance(values[0], list):
        return [row for part in values for row in part]
    return torch.cat(values)


def _reordered(values: Any, order: list[int]) -> Any:
    if not _is_per_row(values):
        return values
    return [values[row] for row in order] if isinstance(values, list) else values[order]
