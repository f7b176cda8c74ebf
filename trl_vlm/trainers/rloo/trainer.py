"""TRL's `RLOOTrainer` with the features that all trainers of this package share."""

from typing import Any

import trl
from peft import PeftConfig
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerCallback

from trl_vlm.models.roles import remove_roles
from trl_vlm.trainers import _trl
from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.card import CardFacts
from trl_vlm.trainers.checks import refuse_pathless_reference
from trl_vlm.trainers.group_sharing import SharedGroups
from trl_vlm.trainers.image_features import FeaturesPerRollout
from trl_vlm.trainers.ppo.rollout_rows import check_rollout_rows
from trl_vlm.trainers.preparation import complete_arguments, complete_processor, prepare_model
from trl_vlm.trainers.resuming import ResumableRollouts
from trl_vlm.trainers.reward_roles import RewardsOnPolicyBase
from trl_vlm.trainers.rloo.config import RLOOConfig
from trl_vlm.trainers.rollout_images import UndecodedRollouts
from trl_vlm.trainers.sampled_parts import SampledInParts
from trl_vlm.trainers.types import EvaluationRows, Model, Optimizers, Processor, RewardFunction, Rows


class RLOOTrainer(
    SharedGroups,
    FeaturesPerRollout,
    SampledInParts,
    UndecodedRollouts,
    RewardsOnPolicyBase,
    ResumableRollouts,
    trl.RLOOTrainer,
):
    """A drop-in for `trl.RLOOTrainer`: frozen parts, own rates, LoRA presets, exact resuming.

    The arguments are those of `trl.RLOOTrainer`; `peft_config.target_modules` may be "language-model" or
    "language-model-and-projector". A bad row is an error that names it, and a rollout may hold rows with and without
    images. The replies to a prompt share one pass through it (`share_prefix`). The losses are TRL's: to the last digit
    without sharing, and up to rounding with it.
    """

    args: RLOOConfig

    _tag_names = ["trl", "rloo", "trl-vlm"]

    def __init__(
        self,
        model: str | Model,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: trl.RLOOConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvaluationRows | None = None,
        processing_class: Processor | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = complete_arguments(args, model, RLOOConfig)
        if args.beta != 0.0:
            refuse_pathless_reference(model, peft_config, "Set `beta=0`, which needs none")
        processing_class = complete_processor(
            processing_class, model, args, padding_side="left", truncation_side="left"
        )
        check_rollout_rows(train_dataset, "train", processing_class)
        check_rollout_rows(eval_dataset, "eval", processing_class)
        if not isinstance(model, str):
            remove_roles(model)
        super().__init__(
            model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=complete_peft_config(peft_config, model, args),
            **kwargs,
        )
        _trl.check_attributes(self)
        self.keep_images_undecoded(train_dataset, eval_dataset)
        prepare_model(self.model, args)
        self.share_with_rewards(model)
        self.share_groups()
        self.keep_image_features()
        self.save_where_rollouts_end(args)

    def card_facts(self) -> CardFacts:
        """The facts of this run for the model card."""
        rewards = ", ".join(f"`{name}`" for name in self.reward_func_names)
        papers = [self._paper] if self._paper else []
        return CardFacts(["REINFORCE leave-one-out.", f"Rewards: {rewards}."], papers=papers)
