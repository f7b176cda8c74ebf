"""TRL's `SFTTrainer` with the features that all trainers of this package share."""

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor
from transformers import BitsAndBytesConfig, DataCollator, EvalPrediction, TrainerCallback, TrainingArguments

from trl_vlm.data.named_rows import undecoded
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.models.families import family_of
from trl_vlm.models.image_tokens import image_tokens
from trl_vlm.models.reply_ends import with_reply_ends
from trl_vlm.models.reply_marks import marks_replies, with_reply_marks
from trl_vlm.trainers import _trl
from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.card import CardFacts
from trl_vlm.trainers.ppo.rollout_rows import rollout_rows
from trl_vlm.trainers.preparation import (
    PreparedTrainer,
    complete_arguments,
    complete_processor,
    prepare_model,
)
from trl_vlm.trainers.sft.collator import SupervisedCollator
from trl_vlm.trainers.sft.config import SFTConfig
from trl_vlm.trainers.sft.rows import check_supervised_rows
from trl_vlm.trainers.types import EvaluationRows, Model, Optimizers, Processor, Rows

logger = logging.getLogger(__name__)

TEMPLATE_FILES = (".jinja", ".j2")


class SFTTrainer(PreparedTrainer, trl.SFTTrainer):
    """A drop-in for `trl.SFTTrainer`: a processor that can train, frozen parts, own rates, LoRA presets.

    The arguments are those of `trl.SFTTrainer`; `peft_config.target_modules` may be "language-model" or
    "language-model-and-projector". A reply that the chat template leaves open gets its end (`append_eos`), and a row
    whose whole reply `max_length` cuts off is an error (with images) or left out with a warning (without).
    `assistant_only_loss` works with every chat template. Otherwise, with none of our options set, the losses are
    TRL's.
    """

    args: SFTConfig

    _tag_names = ["trl", "sft", "trl-vlm"]

    def __init__(
        self,
        model: str | Model,
        args: trl.SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvaluationRows | None = None,
        processing_class: Processor | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        **kwargs: Any,
    ):
        args = complete_arguments(_from_transformers(args), model, SFTConfig)
        has_own_collator = data_collator is not None
        if not has_own_collator:  # TRL looks at the first row, and `datasets` would open an address in it
            train_dataset, eval_dataset = _undecoded(train_dataset), _undecoded(eval_dataset)
        processing_class = _with_template(complete_processor(processing_class, model, args), args)
        template_path, args.chat_template_path = args.chat_template_path, _left_to_trl(args)
        marked = _with_reply_marks(processing_class, args)
        check_supervised_rows(train_dataset, "train", processing_class)
        check_supervised_rows(eval_dataset, "eval", processing_class)
        super().__init__(
            model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=marked,
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
        args.chat_template_path = template_path
        if marked is not processing_class:
            self._keep_template(processing_class)
        prepare_model(self.model, args)
        self._names_rows = self._is_vision_dataset and not has_own_collator
        if self._names_rows:
            self.data_collator = SupervisedCollator(
                self.data_collator,
                args.max_length,
                image_tokens(processing_class),
                first_reply_ends_prefix=args.assistant_only_loss
                and family_of(self.model.config).prefix_is_bidirectional,
            )
            self.train_dataset = rollout_rows(self.train_dataset, "train")
            self.eval_dataset = rollout_rows(self.eval_dataset, "eval")

    def _keep_template(self, processor: Processor) -> None:
        """Lets the processor that is saved have its own template; batches are made with the marked one.

        TRL reads such a template, for rows and collator, from `chat_template`, where it puts its own ones.
        """
        marked = self.processing_class.chat_template
        assert isinstance(marked, str)  # as we made it
        self.chat_template = marked
        self.processing_class.chat_template = processor.chat_template
        if isinstance(self.data_collator, _trl.DataCollatorForVisionLanguageModeling):
            self.data_collator.chat_template = marked

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; rows with images that are passed here are named as well."""
        if self._names_rows and isinstance(eval_dataset, Dataset | IterableDataset | dict):
            eval_dataset = rollout_rows(eval_dataset, "eval")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None  # since the line before
        if ROW_NAME not in self._signature_columns:
            self._signature_columns.append(ROW_NAME)

    def _prepare_dataset(
        self,
        dataset: Rows,
        processing_class: Processor,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Rows:
        """As in TRL, which drops rows without images whose reply `max_length` cuts off: here it says how many."""
        prepared = super()._prepare_dataset(
            dataset, processing_class, args, packing, formatting_func, dataset_name=dataset_name
        )
        if packing or not isinstance(dataset, Dataset) or not isinstance(prepared, Dataset):
            return prepared
        if len(prepared) == len(dataset):
            return prepared
        cut = (
            f"`max_length={args.max_length}` cuts off the whole reply of {len(dataset) - len(prepared)} of the "
            f"{len(dataset)} rows of the {dataset_name} dataset"
        )
        if len(prepared) == 0:
            raise ValueError(f"{cut}: none is left. Raise it, or set it to None.")
        logger.warning("%s, and they are left out.", cut)
        return prepared

    def card_facts(self) -> CardFacts:
        """The facts of this run for the model card."""
        return CardFacts(["Supervised fine-tuning on replies."])


def _from_transformers(args: TrainingArguments | None) -> TrainingArguments | None:
    """Arguments of transformers' own `Trainer`, which TRL's takes too, as ours; those of other trainers stay."""
    if args is None or isinstance(args, trl.SFTConfig):
        return args
    options = {**args.to_dict(), "hub_token": args.hub_token}  # `to_dict` hides the token
    known = {option.name for option in dataclasses.fields(SFTConfig) if option.init}
    return SFTConfig(**options) if options.keys() <= known else args


def _undecoded(dataset: Any) -> Any:
    """The dataset, or each of several by name, with images as they are stored."""
    if isinstance(dataset, dict):
        return {name: _undecoded(rows) for name, rows in dataset.items()}
    return undecoded(dataset) if isinstance(dataset, Dataset | IterableDataset) else dataset


def _with_reply_marks(processor: Processor, args: SFTConfig) -> Processor:
    """The processor, or for a loss over replies a copy that marks them where neither it nor TRL does."""
    if not args.assistant_only_loss or marks_replies(processor):
        return processor
    try:
        _trl.get_training_chat_template(processor)
    except ValueError:  # a template that TRL does not know
        return with_reply_marks(processor)
    return processor


def _left_to_trl(args: SFTConfig) -> str | None:
    """The template's path if TRL is to read it: the template of another tokenizer, whose tokens it adds."""
    path = args.chat_template_path
    return None if path is None or Path(path).suffix in TEMPLATE_FILES else path


def _with_template(processor: Processor, args: SFTConfig) -> Processor:
    """The processor with the template of the file `args.chat_template_path`, if any, which then ends replies, too."""
    path = args.chat_template_path
    if path is None or _left_to_trl(args) is not None:
        return processor
    processor = copy.copy(processor)
    processor.chat_template = Path(path).read_text(encoding="utf-8")
    return with_reply_ends(processor) if args.append_eos else processor
