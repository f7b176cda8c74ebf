"""PPO with a critic for vision-language models, on TRL's GRPOTrainer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_vlm.data.rows import name_of
from trl_vlm.maths.advantages import generalized_advantages, moments, per_token_kl, shaped_rewards, whiten
from trl_vlm.maths.losses import clipped_value_loss
from trl_vlm.maths.masked import masked_sum
from trl_vlm.models.parts import freeze_vision_tower
from trl_vlm.trainers import _trl
from trl_vlm.trainers._trl import disable_gradient_checkpointing
from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.card import FACT_RLHF_PAPER, CardFacts
from trl_vlm.trainers.checks import check_depends_on_pixels, check_log_probs, other_pixels
from trl_vlm.trainers.group_sharing import SharedGroups
from trl_vlm.trainers.image_features import FeaturesPerRollout
from trl_vlm.trainers.ppo.checkpoints import CheckpointsWithCritic
from trl_vlm.trainers.ppo.config import PAPER, PPOConfig
from trl_vlm.trainers.ppo.critics import CriticSources, chosen_critic
from trl_vlm.trainers.ppo.logs import RolloutLogs
from trl_vlm.trainers.ppo.metrics import rollout_sums
from trl_vlm.trainers.ppo.passes import ReshuffledPasses
from trl_vlm.trainers.ppo.reference import own_reference, prepared_reference
from trl_vlm.trainers.ppo.rewards import load_options_of_rewards, reward_functions
from trl_vlm.trainers.ppo.rollout import Rollout, has_ended, reply_mask, widened
from trl_vlm.trainers.ppo.rollout_images import model_inputs
from trl_vlm.trainers.ppo.setup import check_input
from trl_vlm.trainers.ppo.token_rewards import TokenRewards
from trl_vlm.trainers.preparation import (
    complete_arguments,
    complete_processor,
    give_own_learning_rate,
    loading_arguments_of_others,
    prepare_model,
)
from trl_vlm.trainers.resuming import ResumableRollouts
from trl_vlm.trainers.rollout_images import UndecodedRollouts
from trl_vlm.trainers.sampled_parts import SampledInParts
from trl_vlm.trainers.types import (
    Environments,
    EvaluationRows,
    Model,
    Optimizers,
    Processor,
    RewardFunction,
    Rows,
    gathered,
    summed,
)


class PPOTrainer(
    CheckpointsWithCritic,
    RolloutLogs,
    ReshuffledPasses,
    SharedGroups,
    FeaturesPerRollout,
    SampledInParts,
    UndecodedRollouts,
    ResumableRollouts,
    GRPOTrainer,
):
    """Proximal policy optimization of a vision-language (or language) model, with a critic.

    Rollouts, batches of every family, vLLM, DeepSpeed, FSDP and logging are those of `trl.GRPOTrainer`. On top of it
    come a critic, a per-token KL penalty in the reward, GAE, whitened advantages, a clipped value loss, and several
    passes over each rollout in mini-batches (`PPOConfig`).

    The reward of a reply is the weighted sum of `reward_funcs`, TRL reward functions that see the images and every
    column of the row (`facts` too). In the place of a reply's number one may return a list with a number for each of
    its tokens (`completion_ids`). The policy and the critic see only the prompt, the images and the reply.

    With `peft_config`, or a policy that has an adapter, the reference is the same base model: with its adapter off,
    or with a frozen copy of the adapter it started from. Without PEFT it is a frozen copy of the policy.

    Checkpoints hold the policy, as any Hugging Face model, and the critic's trained weights beside it in
    `value_model.safetensors`.

    Args:
        model: Folder or hub id, model, or PEFT model.
        reward_funcs: TRL reward functions. The folder of a vision-language reward model becomes an image-and-facts
            `RewardModelReward`.
        args: The configuration.
        train_dataset: Rows with `prompt`, `images` and whatever columns the reward functions read.
        ref_model: The reference, if it is not the starting policy.
        reward_model: Folder, hub id or model: shorthand for one more `RewardModelReward`, from which the critic
            starts.
        value_model: Folder, hub id or model that the critic starts from, if not from `reward_model`.
        value_peft_config: The critic's adapters; like the policy's by default.

    The other arguments are those of `trl.GRPOTrainer`, which collates rollouts itself: there is no `data_collator`.

    Source: 1707.06347; for vision-language models section 2.3 of Fact-RLHF (2309.14525).
    Differs from Fact-RLHF's public code: the score sits on the last real token, whitening and losses ignore padding,
    and rewards are not multiplied by ten where they are not whitened.
    """

    # Set in TRL's constructor without type annotations.
    beta: float
    temperature: float
    reward_weights: Tensor

    _tag_names = ["trl", "ppo", "trl-vlm"]
    _name = "PPO"
    _paper = PAPER  # for the model card
    mends_reply_types = True

    def __init__(
        self,
        model: str | Model,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvaluationRows | None = None,
        processing_class: Processor | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable[..., dict[str, Any]] | None = None,
        environment_factory: Environments | None = None,
        *,
        ref_model: PreTrainedModel | None = None,
        reward_model: str | Model | None = None,
        value_model: str | Model | None = None,
        value_peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = complete_arguments(args, model, PPOConfig)
        processing_class = complete_processor(
            processing_class, model, args, padding_side="left", truncation_side="left"
        )
        check_input(model, args, train_dataset, eval_dataset, processing_class)
        reference = own_reference(model, ref_model, peft_config, args)
        if reference is not None:
            args.beta = 0.0  # GRPOTrainer would make another one
        self._token_rewards = TokenRewards()
        reward_options = load_options_of_rewards(model, loading_arguments_of_others(args), quantization_config)
        super().__init__(
            model=model,
            reward_funcs=reward_functions(
                reward_funcs, reward_model, processing_class, reward_options, self._token_rewards
            ),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=complete_peft_config(peft_config, model, args),
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
            **kwargs,
        )
        _trl.check_attributes(self)
        check_log_probs(self.model, self.temperature)
        self.keep_images_undecoded(train_dataset, eval_dataset)
        self.kl_coef = args.beta = self.beta = args.kl_coef
        if reference is not None:
            self.ref_model = prepared_reference(reference, self)
        prepare_model(self.model, args)
        sources = CriticSources(model, value_model, reward_model, value_peft_config, peft_config, quantization_config)
        self._critic = chosen_critic(self, sources)
        # A critic on the policy's base reads what the policy's backbone packs.
        self.share_groups(*([self._critic.model] if self._critic.shared_base is None else []))
        self.keep_image_features(critic=self._critic.model)
        if self.use_vllm:
            self.vllm_generation.sync_weights = self._without_critic(self.vllm_generation.sync_weights)
        self._pixels_checked = not args.check_pixels
        self._save_at_rollout_ends()

    def _save_at_rollout_ends(self) -> None:
        args = self.args
        self.save_where_rollouts_end(args)

    def _without_critic(self, sync_weights: Callable[[], None]) -> Callable[[], None]:
        """vLLM copies every parameter of the policy and knows none of the critic's."""

        def sync() -> None:
            with self._critic.policy_alone():
                sync_weights()

        return sync

    def card_facts(self) -> CardFacts:
        """The facts of this run for the model card."""
        args = self.args
        method = [
            f"Proximal policy optimization with a critic, {args.num_iterations} passes over each rollout, KL weight "
            f"{args.kl_coef} in the reward (`{args.kl_estimator}`).",
            f"Rewards: {', '.join(f'`{name}`' for name in self.reward_func_names)}.",
            f"The critic's trained weights are in `{self._critic.place}`; generation does not need them.",
        ]
        return CardFacts(method, papers=[PAPER, FACT_RLHF_PAPER])

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """TRL's optimizer; the critic, its projector included, has its own groups if `value_learning_rate` is set."""
        optimizer = super().create_optimizer(model)
        if self.args.value_learning_rate is not None:
            give_own_learning_rate(optimizer, self._critic.parameters(), self.args.value_learning_rate)
        return optimizer

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        unscored = rewards.isnan().all(dim=1)
        if unscored.any():
            raise ValueError(
                f"{int(unscored.sum())} of {len(rewards)} replies have no reward: every reward function returned None "
                f"for reply {int(unscored.nonzero()[0])} of the rollout. Each reply needs at least one reward."
            )
        # All processes' replies, before TRL centers them by group: (B * processes, functions)
        weights = self.reward_weights.to(rewards.device)
        self._scores = (rewards * weights).nansum(dim=1)
        names = [name_of(row, place, " of the rollout") for place, row in enumerate(inputs)]
        self._token_scores = self._token_rewards.taken(completion_ids_list, weights, names, self.reward_func_names)
        return rewards

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.policy_alone():
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Rollout:
        if (rollout := self.served_again) is not None:
            return rollout
        # PEFT's own switch to the reference, which TRL uses, chooses anew what trains.
        shared = self._critic.shared_base if self.ref_model is None and self.kl_coef != 0 else None
        with self._kl_in_the_reward() if shared is not None else nullcontext():
            batch = cast(Rollout, super()._generate_and_score_completions(inputs))
        if self.args.freeze_vision_tower:
            # To compute the reference, PEFT switches adapters off and on again, and that makes all of them trainable.
            freeze_vision_tower(self.model)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if not self._pixels_checked:
                self._check_pixels(batch)
            if "old_per_token_logps" not in batch:
                batch["old_per_token_logps"] = self._score_tokens(self.model, batch)
            if shared is not None:
                with shared.acting_as_reference():
                    batch["ref_per_token_logps"] = self._score_tokens(self.model, batch)
            batch["old_values"] = self._score_tokens(self._critic.as_policy(), batch)
        self._add_advantages(batch)
        self.keep_for_later_passes(batch)
        return batch

    def _score_tokens(self, model: Callable, batch: Rollout) -> Tensor:
        """Log-probabilities (or values) of the reply tokens of a rollout, (B, T)."""
        args = self.args
        batch_size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        logps, _, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            batch_size=batch_size,
            **model_inputs(batch),
        )
        return logps

    def _check_pixels(self, batch: Rollout) -> None:
        mask = reply_mask(batch)
        can_tell = torch.tensor([float("pixel_values" in batch and mask.any())], device=mask.device)
        if not gathered(self.accelerator, can_tell).any():
            return
        # Every process takes part, even one without images: sharded models run on all of them or on none.
        elsewhere = batch.copy()
        if "pixel_values" in batch:
            elsewhere["pixel_values"] = other_pixels(batch["pixel_values"])
        logps, other_logps = (self._score_tokens(self.model, rows) for rows in (batch, elsewhere))
        difference = gathered(self.accelerator, ((logps - other_logps) * mask).abs().max()[None])
        check_depends_on_pixels(difference, torch.zeros_like(difference), "policy's log-probabilities")
        self._pixels_checked = True

    def _add_advantages(self, batch: Rollout) -> None:
        """Computes the targets of the two losses from scores, log-probabilities and values. Everything is (B, T)."""
        args, mask = self.args, reply_mask(batch).bool()
        first = self.accelerator.process_index * len(mask)
        scores = self._scores[first : first + len(mask)]
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~has_ended(batch, self.eos_token_ids)
        old_logps = batch["old_per_token_logps"]
        kl = per_token_kl(old_logps, batch.get("ref_per_token_logps", old_logps), args.kl_estimator)
        rewards = shaped_rewards(scores, kl, mask, self.kl_coef, widened(self._token_scores, mask))
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, self._global_moments(rewards, mask), shift_mean=False)
        advantages, returns = generalized_advantages(
            rewards, batch["old_values"], mask, gamma=args.gamma, lam=args.lam
        )
        values = batch["old_values"]
        sums = rollout_sums(mask, scores=scores, kl=kl, advantages=advantages, returns=returns, values=values)
        self._log_rollout(summed(self.accelerator, sums))
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, self._global_moments(advantages, mask))
        batch["advantages"], batch["returns"] = advantages, returns
        self._log_replies(mask, scores=scores, kl=kl, values=values, advantages=advantages)

    def _global_moments(self, values: Tensor, mask: Tensor) -> Tensor:
        return summed(self.accelerator, moments(values, mask))

    # Losses

    def _compute_loss(self, model: nn.Module, inputs: Rollout) -> Tensor:
        with self._critic.collecting() as collected, self._kl_in_the_reward():
            policy_loss = super()._compute_loss(model, inputs)
        mask = reply_mask(inputs)
        values = torch.cat(collected)[:, -mask.shape[1] :]  # (B, T)
        terms = clipped_value_loss(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)
        value_loss = masked_sum(terms.loss, mask) / self._tokens_per_update(inputs)
        self._log_value_loss(terms, mask)
        return policy_loss + self.args.vf_coef * value_loss

    @contextmanager
    def _kl_in_the_reward(self) -> Iterator[None]:
        """TRL adds its own KL to the loss where `beta` is not zero."""
        beta, self.beta = self.beta, 0.0
        try:
            yield
        finally:
            self.beta = beta

    def _tokens_per_update(self, inputs: Rollout) -> Tensor:
        """Reply tokens of one optimizer step on all processes, per process and micro-batch: TRL's normalizer."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            assert self.args.steps_per_generation is not None  # GRPOConfig has computed it
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return tokens
