"""PPO with a critic for vision-language models, on TRL's GRPOTrainer."""

import json
import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_vlm.maths.advantages import generalized_advantages, moments, per_token_kl, shaped_rewards, whiten
from trl_vlm.maths.losses import adapted_kl_coef, clipped_value_loss
from trl_vlm.maths.masked import masked_sum
from trl_vlm.models.parts import freeze_vision_tower
from trl_vlm.trainers import _trl
from trl_vlm.trainers._trl import disable_gradient_checkpointing
from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.card import FACT_RLHF_PAPER, CardFacts
from trl_vlm.trainers.checks import check_depends_on_pixels, check_log_probs, other_pixels
from trl_vlm.trainers.ppo.config import PAPER, PPOConfig
from trl_vlm.trainers.ppo.critic import CRITIC_FILE, load_critic, make_critic, prepare_critic, save_critic
from trl_vlm.trainers.ppo.joint_forward import (
    CRITIC,
    JointForward,
    ValuesAsLogProbs,
    check_same_vocabulary,
    critic_apart,
    refuse_several_devices,
    remove_critic,
)
from trl_vlm.trainers.ppo.metrics import rollout_metrics, rollout_sums
from trl_vlm.trainers.ppo.reference import own_reference, prepared_reference
from trl_vlm.trainers.ppo.rewards import RewardFunction, load_options_of_rewards, reward_functions
from trl_vlm.trainers.ppo.rollout_images import entries_per_row, family_inputs, model_inputs, reading_images
from trl_vlm.trainers.ppo.rollout_rows import (
    Rows,
    check_enough_rows,
    check_rollout_rows,
    prepared_rows,
    refuse_mixed_rows,
    rollout_rows,
)
from trl_vlm.trainers.preparation import (
    PreparedTrainer,
    Processor,
    complete_arguments,
    complete_processor,
    give_own_learning_rate,
    loading_arguments_of_others,
    prepare_model,
)
from trl_vlm.trainers.resuming import ResumableRepeatSampler, SaveAtRolloutEnds, check_best_model_saving

_STATE_FILE = "ppo_state.json"


class PPOTrainer(PreparedTrainer, GRPOTrainer):
    """Proximal policy optimisation of a vision-language (or language) model, with a critic.

    Rollouts, batches of every family, vLLM, DeepSpeed, FSDP and logging are those of `trl.GRPOTrainer`. On top of it
    come a critic, a per-token KL penalty in the reward, GAE, whitened advantages, a clipped value loss, and several
    passes over each rollout in mini-batches (`PPOConfig`).

    The reward of a reply is the weighted sum of `reward_funcs`, TRL reward functions that see the images and every
    column of the row (`facts` too). The policy and the critic see the prompt, the images and the reply alone.

    With `peft_config`, or a policy that has an adapter, the reference is the same base model: with its adapter off,
    or with a frozen copy of the adapter it started from. Without PEFT it is a frozen copy of the policy.

    Checkpoints hold the policy, as any Hugging Face model, and the critic's trained weights beside it in
    `value_model.safetensors`.

    Args:
        model: folder or hub id, model, or PEFT model.
        reward_funcs: TRL reward functions. The folder of a vision-language reward model becomes an image-and-facts
            `RewardModelReward`.
        args: the configuration.
        train_dataset: rows with `prompt`, `images` and whatever columns the reward functions read.
        ref_model: the reference, if it is not the starting policy.
        reward_model: folder, hub id or model: short for one more `RewardModelReward`, and where the critic starts.
        value_model: folder, hub id or model that the critic starts from, if not from `reward_model`.
        value_peft_config: the critic's adapters; like the policy's by default.

    The other arguments are those of `trl.GRPOTrainer`, which collates rollouts itself: there is no `data_collator`.

    Source: 1707.06347; for vision-language models section 2.3 of Fact-RLHF (2309.14525).
    Differs from Fact-RLHF's public code: the score sits on the last real token, whitening and losses leave padding
    out, and rewards are not multiplied by ten where they are not whitened.
    """

    _tag_names = ["trl", "ppo", "trl-vlm"]
    _name = "PPO"
    _paper = PAPER  # for the model card

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: Processor | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable[..., dict[str, Any]] | None = None,
        environment_factory: Any = None,
        *,
        ref_model: PreTrainedModel | None = None,
        reward_model: str | PreTrainedModel | PeftModel | None = None,
        value_model: str | PreTrainedModel | PeftModel | None = None,
        value_peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = complete_arguments(args, model, PPOConfig)
        processing_class = complete_processor(
            processing_class, model, args, padding_side="left", truncation_side="left"
        )
        self._check_input(model, args, train_dataset, eval_dataset, processing_class)
        ref_model = own_reference(model, ref_model, peft_config, args)
        if ref_model is not None:
            args.beta = 0.0  # GRPOTrainer would make another one
        reward_options = load_options_of_rewards(model, loading_arguments_of_others(args), quantization_config)
        critic_options = {} if quantization_config is None else {"quantization_config": quantization_config}

        super().__init__(
            model=model,
            reward_funcs=reward_functions(reward_funcs, reward_model, processing_class, reward_options),
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
        self.train_dataset = rollout_rows(train_dataset, "train")
        self.eval_dataset = rollout_rows(eval_dataset, "eval")
        self.kl_coef = args.beta = self.beta = args.kl_coef
        if ref_model is not None:
            self.ref_model = prepared_reference(ref_model, self)
        prepare_model(self.model, args)
        self._add_critic(value_model, reward_model, value_peft_config or peft_config, critic_options)
        self._pixels_checked = not args.check_pixels
        micro_batches = args.steps_per_generation * self.num_iterations
        check_best_model_saving(args, micro_batches / args.gradient_accumulation_steps)
        self.add_callback(SaveAtRolloutEnds(self, micro_batches))

    def _get_train_sampler(self, dataset: Rows | None = None) -> ResumableRepeatSampler:
        return ResumableRepeatSampler.like(super()._get_train_sampler(dataset))

    def _check_input(
        self,
        model: str | nn.Module,
        args: PPOConfig,
        train_dataset: Rows | None,
        eval_dataset: Rows | dict[str, Rows] | None,
        processor: Processor | None,
    ) -> None:
        """Stop before anything is loaded; and take the critic of an earlier run off a model in memory."""
        check_rollout_rows(train_dataset, "train", processor)
        check_rollout_rows(eval_dataset, "eval", processor)
        check_enough_rows(train_dataset, args.generation_batch_size // args.num_generations)
        if isinstance(model, nn.Module):
            refuse_several_devices(model)
            remove_critic(model)

    def _add_critic(
        self,
        value_model: str | nn.Module | None,
        reward_model: str | nn.Module | None,
        peft_config: PeftConfig | None,
        quantization: dict[str, Any],
    ) -> None:
        """Make the critic a child of the policy, so that one optimiser, wrapper and checkpoint holds both."""
        refuse_several_devices(self.model)
        critic = make_critic(
            self.model,
            value_model=value_model,
            reward_model=reward_model,
            peft_config=peft_config,
            args=self.args,
            load_options={"dtype": self.model.dtype, **quantization, **loading_arguments_of_others(self.args)},
        )
        check_same_vocabulary(self.model, critic)
        prepare_model(critic, self.args)
        prepare_critic(critic, self.args)
        # With FSDP's memory-efficient loading all processes but the first hold a model without values.
        is_empty = any(parameter.is_meta for parameter in critic.parameters())
        if not is_empty and not getattr(critic, "is_quantized", False):
            critic.to(self.accelerator.device)
        self._joint_forward = JointForward(self.model, critic)
        if self.use_vllm:
            self.vllm_generation.sync_weights = self._without_critic(self.vllm_generation.sync_weights)

    def _without_critic(self, sync_weights: Callable[[], None]) -> Callable[[], None]:
        """vLLM copies every parameter of the policy and knows none of the critic's."""

        def sync() -> None:
            with critic_apart(self.model):
                sync_weights()

        return sync

    def card_facts(self) -> CardFacts:
        """What the model card says of this run."""
        args = self.args
        method = [
            f"Proximal policy optimization with a critic, {args.num_iterations} passes over each rollout, KL weight "
            f"{args.kl_coef} in the reward (`{args.kl_estimator}`).",
            f"Rewards: {', '.join(f'`{name}`' for name in self.reward_func_names)}.",
            f"The critic's trained weights are in `{CRITIC_FILE}`; generation does not need them.",
        ]
        return CardFacts(method, papers=[PAPER, FACT_RLHF_PAPER])

    @property
    def value_model(self) -> nn.Module:
        """The critic. `trainer.value_model.save_pretrained(folder)` writes it as a reward model of its own."""
        return self.model.get_submodule(CRITIC)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """TRL's optimiser; the critic, its projector included, has its own groups if `value_learning_rate` is set."""
        optimizer = super().create_optimizer(model)
        if self.args.value_learning_rate is not None:
            give_own_learning_rate(optimizer, self.value_model.parameters(), self.args.value_learning_rate)
        return optimizer

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        unscored = rewards.isnan().all(dim=1)
        if unscored.any():
            raise ValueError(
                f"{int(unscored.sum())} of {len(rewards)} replies have no reward: every reward function returned None "
                f"for reply {int(unscored.nonzero()[0])} of the rollout. Each reply needs at least one reward."
            )
        # All processes' replies, before TRL centres them by group: (B * processes, functions)
        self._scores = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return rewards

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        if images is not None:
            # TRL says None for a row without images in a batch that has some, and processors refuse it.
            # Delete when TRL trains on such batches: https://github.com/huggingface/trl/issues/6967.
            images = [row or [] for row in images]
        return prompt_ids, images, multimodal_fields

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        kwargs = family_inputs(self.model.config, kwargs, logits_to_keep)
        model = reading_images(model, self.model.config, kwargs.get("num_images"))
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _generate_and_score_completions(self, inputs):
        rows = prepared_rows(inputs, self.processing_class)
        refuse_mixed_rows(rows, self)
        batch = super()._generate_and_score_completions(rows)
        batch |= entries_per_row(batch)
        if self.args.freeze_vision_tower:
            # To compute the reference, PEFT switches adapters off and on again, and that makes all of them trainable.
            freeze_vision_tower(self.model)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if not self._pixels_checked:
                self._check_pixels(batch)
            if "old_per_token_logps" not in batch:
                batch["old_per_token_logps"] = self._score_tokens(self.model, batch)
            batch["old_values"] = self._score_tokens(ValuesAsLogProbs(self.value_model), batch)
        self._add_advantages(batch)
        return batch

    def _score_tokens(self, model: Callable, batch: dict[str, Any]) -> Tensor:
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

    def _check_pixels(self, batch: dict[str, Any]) -> None:
        mask = self._reply_mask(batch)
        can_tell = torch.tensor([float("pixel_values" in batch and mask.any())], device=mask.device)
        if not self.accelerator.gather(can_tell).any():
            return
        # Every process takes part, also one without images: sharded models run on all of them or on none.
        elsewhere = dict(batch)
        if "pixel_values" in batch:
            elsewhere["pixel_values"] = other_pixels(batch["pixel_values"])
        logps, other_logps = (self._score_tokens(self.model, rows) for rows in (batch, elsewhere))
        difference = self.accelerator.gather(((logps - other_logps) * mask).abs().max()[None])
        check_depends_on_pixels(difference, torch.zeros_like(difference), "policy's log-probabilities")
        self._pixels_checked = True

    def _add_advantages(self, batch: dict[str, Any]) -> None:
        """From scores, log-probabilities and values to what the two losses fit. Everything is (B, T)."""
        args, mask = self.args, self._reply_mask(batch).bool()
        first = self.accelerator.process_index * len(mask)
        scores = self._scores[first : first + len(mask)]
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~self._has_ended(batch)
        old_logps = batch["old_per_token_logps"]
        kl = per_token_kl(old_logps, batch.get("ref_per_token_logps", old_logps), args.kl_estimator)
        rewards = shaped_rewards(scores, kl, mask, self.kl_coef)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, self._global_moments(rewards, mask), shift_mean=False)
        advantages, returns = generalized_advantages(
            rewards, batch["old_values"], mask, gamma=args.gamma, lam=args.lam
        )
        values = batch["old_values"]
        sums = rollout_sums(mask, scores=scores, kl=kl, advantages=advantages, returns=returns, values=values)
        self._log_rollout(self.accelerator.reduce(sums))
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, self._global_moments(advantages, mask))
        batch["advantages"], batch["returns"] = advantages, returns

    @staticmethod
    def _reply_mask(batch: dict[str, Any]) -> Tensor:
        """(B, T), 1 on the tokens that the policy wrote: neither padding nor a tool's answer."""
        return batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]

    def _has_ended(self, batch: dict[str, Any]) -> Tensor:
        """(B,), true for replies that contain an end-of-reply token (padding, which may be the same id, left out)."""
        ends = torch.isin(batch["completion_ids"], torch.tensor(self.eos_token_ids, device=self.accelerator.device))
        return (ends & batch["completion_mask"].bool()).any(dim=1)

    def _global_moments(self, values: Tensor, mask: Tensor) -> Tensor:
        return self.accelerator.reduce(moments(values, mask), reduction="sum")

    # Losses

    def _compute_loss(self, model, inputs):
        with self._joint_forward.collecting() as collected, self._kl_in_the_reward():
            policy_loss = super()._compute_loss(model, inputs)
        mask = self._reply_mask(inputs)
        values = torch.cat(collected)[:, -mask.shape[1] :]  # (B, T)
        terms = clipped_value_loss(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)
        value_loss = masked_sum(terms.loss, mask) / self._tokens_per_update(inputs)
        self._log_value_loss(terms, mask)
        return policy_loss + self.args.vf_coef * value_loss

    @contextmanager
    def _kl_in_the_reward(self):
        """TRL adds its own KL to the loss where `beta` is not zero."""
        beta, self.beta = self.beta, 0.0
        try:
            yield
        finally:
            self.beta = beta

    def _tokens_per_update(self, inputs: dict[str, Any]) -> Tensor:
        """Reply tokens of one optimiser step on all processes, per process and micro-batch: TRL's normaliser."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return tokens

    # Logs

    def _log_rollout(self, sums: Tensor) -> None:
        """Log the rollout of all processes and, while training, adapt the KL coefficient to it."""
        found = {**rollout_metrics(sums), "ppo/kl_coef": self.kl_coef}
        for name, value in found.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        if self.args.kl_target is not None and self.model.training:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                found["ppo/kl"],
                target=self.args.kl_target,
                horizon=self.args.kl_horizon,
                replies=int(sums[-1]),
            )

    def _log_value_loss(self, terms, mask: Tensor) -> None:
        sums = torch.stack([masked_sum(terms.loss, mask), masked_sum(terms.clipped, mask), mask.sum()]).detach()
        loss, clipped, tokens = self.accelerator.reduce(sums).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["ppo/value_loss"].append(loss / max(tokens, 1))
        metrics["ppo/value_clip_fraction"].append(clipped / max(tokens, 1))

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        with critic_apart(self.model):  # PEFT would save the modules of its adapter, too
            super()._save(output_dir, {k: v for k, v in state_dict.items() if not k.startswith(f"{CRITIC}.")})
        if self.args.should_save:
            save_critic(self.value_model, state_dict, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with nullcontext() if self.is_fsdp_enabled else critic_apart(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # FSDP has saved and loads the policy and its critic as one model
            load_critic(self.value_model, resume_from_checkpoint)
        if self.args.freeze_vision_tower:
            freeze_vision_tower(self.model)  # PEFT loads adapters as trainable

    def _load_best_model(self) -> None:
        whole = self.is_deepspeed_enabled or self.is_fsdp_enabled
        with nullcontext() if whole else critic_apart(self.model):
            super()._load_best_model()
        if not whole:
            load_critic(self.value_model, self.state.best_model_checkpoint)

    def _save_checkpoint(self, model, trial) -> None:
        # First: a checkpoint counts as complete once its last file, Trainer's own, is there.
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, _STATE_FILE), "w", encoding="utf-8") as file:
                json.dump({"kl_coef": self.kl_coef}, file)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and os.path.exists(os.path.join(checkpoint, _STATE_FILE)):
            with open(os.path.join(checkpoint, _STATE_FILE), encoding="utf-8") as file:
                self.kl_coef = json.load(file)["kl_coef"]
        if checkpoint is not None:
            # TRL counts from 0 after a resumption, and would take its next rollouts at the wrong steps.
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
