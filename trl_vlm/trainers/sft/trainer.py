"""TRL's `SFTTrainer` with what all trainers of this package do to a vision-language model."""

from collections.abc import Callable
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import BitsAndBytesConfig, DataCollator, EvalPrediction, PreTrainedModel, TrainerCallback

from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.card import CardFacts
from trl_vlm.trainers.preparation import (
    PreparedTrainer,
    Processor,
    complete_arguments,
    complete_processor,
    prepare_model,
)
from trl_vlm.trainers.sft.config import SFTConfig


class SFTTrainer(PreparedTrainer, trl.SFTTrainer):
    """A drop-in for `trl.SFTTrainer`: a processor that can train, frozen parts, own rates, LoRA presets.

    The arguments are those of `trl.SFTTrainer`; `peft_config.target_modules` may be "language-model" or
    "language-model-and-projector". With nothing of ours set the losses are TRL's.
    """

    _tag_names = ["trl", "sft", "trl-vlm"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: trl.SFTConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: Processor | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        **kwargs: Any,
    ):
        args = complete_arguments(args, model, SFTConfig)
        super().__init__(
            model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=complete_processor(processing_class, model, args),
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=complete_peft_config(peft_config, model, args),
            formatting_func=formatting_func,
            **kwargs,
        )
        prepare_model(self.model, args)

    def card_facts(self) -> CardFacts:
        """What the model card says of this run."""
        return CardFacts(["Supervised fine-tuning on replies."])
