"""Reward models of any vision-language model, that see the images and read the facts."""

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import trl
from datasets import IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)

from trl_vlm.data.encoding import RewardCollator
from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.data.named_rows import NamedRows, check_rows, named_rows
from trl_vlm.data.rows import IMAGE_COLUMNS, PURPOSES, ROW_NAME
from trl_vlm.maths.losses import mean_reward_penalty
from trl_vlm.models.image_tokens import image_tokens
from trl_vlm.models.prefix_sharing.sharing import share_prefix
from trl_vlm.models.reply_ends import with_reply_ends
from trl_vlm.trainers import _trl
from trl_vlm.trainers.adapters import classifier_adapter, complete_peft_config
from trl_vlm.trainers.card import CardFacts
from trl_vlm.trainers.checks import check_depends_on_pixels, other_pixels, refuse_images_on_some_processes
from trl_vlm.trainers.preparation import PreparedTrainer, complete_arguments, complete_processor, prepare_model
from trl_vlm.trainers.reward.config import RewardConfig
from trl_vlm.trainers.reward.metrics import score_statistics
from trl_vlm.trainers.reward.setup import (
    SharingCollator,
    card_facts,
    float_head,
    load_for_training,
    load_tokenizer,
    make_collator,
    refuse_image_options,
    resolve_judge_template,
    set_chat_template,
    wants_images,
    why_no_shared_prefix,
)
from trl_vlm.trainers.types import EvaluationRows, Model, Optimizers, Processor, Rows, base_model, gathered

logger = logging.getLogger(__name__)

TEXT_MAX_LENGTH = trl.RewardConfig.max_length


class RewardTrainer(PreparedTrainer, trl.RewardTrainer):
    """TRL's `RewardTrainer`, which also trains vision-language models on rows with images and facts.

    A model that reads images, on rows with the column `images` or `image` (or with a processor passed), is trained
    on sequences of prompt, reply and judge turn; every other run is TRL's, unchanged. The saved folder holds the
    model with its head, the processor and the judge template.

    Args:
        model: Folder or hub id of a generative model, of a reward model or of a reward model's adapter; or a reward
            model from `load_reward_model`.
        args: Options, ours or TRL's. Default: `RewardConfig("<model>-Reward")`.
        data_collator: As in TRL; with a collator of your own, prompts are computed once per reply.
        train_dataset: Rows with `chosen` and `rejected`; `prompt`, `images`, `facts`, `margin` if there are any.
        eval_dataset: The same, or a dictionary of such datasets.
        processing_class: The processor. Default: the model's.
        compute_metrics: As in TRL; with images it receives predictions of shape (N, 2): the scores of the chosen and
            of the rejected reply.
        callbacks: As in TRL.
        optimizers: As in TRL.
        optimizer_cls_and_kwargs: As in TRL.
        preprocess_logits_for_metrics: As in TRL.
        quantization_config: How a model given by name is quantized.
        peft_config: Adapter; it is made a `SEQ_CLS` one that trains the head in full. `target_modules` may be
            "language-model" or "language-model-and-projector".
        judge_template: The words of the judge turn, in place of `args.judge_template`.
        kwargs: Arguments that a later TRL adds.

    Example:
        >>> trainer = RewardTrainer(model="llava-hf/llava-1.5-7b-hf", train_dataset=rows)
        >>> trainer.train()
    """

    args: RewardConfig

    _tag_names = ["trl", "reward-trainer", "trl-vlm"]

    def __init__(
        self,
        model: str | Model,
        args: trl.RewardConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvaluationRows | None = None,
        processing_class: Processor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        judge_template: JudgeTemplate | None = None,
        **kwargs: Any,
    ):
        args = complete_arguments(args, model, RewardConfig)
        kwargs |= {
            "args": args,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        self.judge_template: JudgeTemplate | None = None
        self._scores: dict[str, list[Tensor]] = defaultdict(list)
        self._pixels_are_checked = not args.check_pixels
        if not wants_images(model, args, train_dataset, processing_class):
            refuse_image_options(args, judge_template)
            args.max_length = TEXT_MAX_LENGTH if args.max_length == "auto" else args.max_length
            tokenizer = processing_class or load_tokenizer(model, args)
            assert isinstance(tokenizer, PreTrainedTokenizerBase)  # a processor wants images
            super().__init__(
                model,
                data_collator=data_collator,
                processing_class=with_reply_ends(tokenizer) if args.append_eos else tokenizer,
                quantization_config=quantization_config,
                peft_config=complete_peft_config(peft_config, model, args),
                **kwargs,
            )
            return
        self.judge_template = resolve_judge_template(model, args, judge_template)
        processor = complete_processor(processing_class, model, args)
        assert isinstance(processor, ProcessorMixin)  # the model reads images
        set_chat_template(processor, args)
        processor = self._processor = with_reply_ends(processor) if args.append_eos else processor
        self._reward_collator = data_collator or make_collator(processor, self.judge_template, args)
        self._init_with_images(model, processor, quantization_config, peft_config, kwargs)
        self._share_prefixes(own_collator=data_collator is not None)

    def _init_with_images(
        self,
        model: str | Model,
        processor: ProcessorMixin,
        quantization_config: BitsAndBytesConfig | None,
        peft_config: PeftConfig | None,
        trl_arguments: dict[str, Any],
    ) -> None:
        """TRL's constructor, with a model that is loaded already and with the processor put in afterwards."""
        args: RewardConfig = trl_arguments["args"]
        model_init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            model = load_for_training(model, args, quantization_config)
            # The model is loaded; TRL would warn that it cannot use them.
            args.model_init_kwargs = quantization_config = None
        _let_parameters_be_unused(args)
        if peft_config is not None:
            peft_config = complete_peft_config(classifier_adapter(peft_config), model, args)
        super().__init__(
            model,
            data_collator=self._reward_collator,
            # TRL's constructor is about tokenizers (pad token, vocabulary); what is saved is the processor.
            processing_class=processor.tokenizer,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **trl_arguments,
        )
        _trl.check_attributes(self)
        args.model_init_kwargs = model_init_kwargs
        self.processing_class = self.callback_handler.processing_class = processor
        if getattr(model, "is_quantized", False):
            float_head(self.model, is_new=peft_config is not None)
        prepare_model(self.model, args)

    def card_facts(self) -> CardFacts:
        """The facts of this run for the model card."""
        return card_facts(self.args, self.judge_template)

    def _share_prefixes(self, own_collator: bool) -> None:
        """Lets a pair compute its prompt and images once, or logs why it does not."""
        reason = why_no_shared_prefix(self.model, self.args, own_collator)
        if reason is None:
            assert isinstance(self._reward_collator, RewardCollator)  # with another one there is a reason
            share_prefix(base_model(self.model), is_tested=not self.args.use_liger_kernel)
            self.data_collator = SharingCollator(self._reward_collator, self.model.config)
        elif self.args.share_prefix and self.accelerator.is_main_process:
            logger.warning("Prompts are computed once per reply, not once per pair: %s.", reason)

    def _prepare_dataset(
        self, dataset: Rows | NamedRows, processing_class: Processor, args: RewardConfig, dataset_name: str
    ) -> Rows | NamedRows:
        """With images: check the rows and name them; the collator does the rest, batch by batch."""
        if self.judge_template is None:
            assert not isinstance(dataset, NamedRows) and isinstance(processing_class, PreTrainedTokenizerBase)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, NamedRows) or ROW_NAME in (dataset.column_names or ()):
            return dataset  # `evaluate` prepares again what `__init__` has prepared
        tokens = image_tokens(self._processor)
        check_rows(dataset, "reward", name=dataset_name, image_tokens=tokens, with_images=True)
        named = named_rows(dataset, dataset_name)
        return self._without_long_rows(named) if args.drop_too_long_rows else named

    def _without_long_rows(self, dataset: NamedRows | IterableDataset) -> NamedRows:
        """The rows that fit into `max_length`; how many do not is logged."""
        collator = self._reward_collator
        assert isinstance(collator, RewardCollator) and collator.max_length is not None  # else the option is refused
        limit = collator.max_length
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "`drop_too_long_rows` has to read every row before training, and the dataset is streamed. Filter it "
                "yourself with `RewardCollator.tokens`, or set `max_length=None`."
            )
        rows = (dataset[index] for index in range(len(dataset)))
        kept = [index for index, row in enumerate(rows) if collator.tokens(row) <= limit]
        if not kept:
            raise ValueError(
                f"Every row of the {dataset.name} dataset is longer than `max_length` = {limit}. Set it higher, or to "
                "None."
            )
        if len(kept) < len(dataset):
            dropped = f"{len(dataset) - len(kept)} of {len(dataset)} rows of the {dataset.name} dataset"
            logger.warning("Left out %s, longer than `max_length` = %d tokens.", dropped, limit)
        return NamedRows(dataset.rows, dataset.name, kept)

    def _set_signature_columns_if_needed(self) -> None:
        """With images: keep the columns that the collator reads."""
        if self.judge_template is None:
            super()._set_signature_columns_if_needed()
        elif self._signature_columns is None:
            self._signature_columns = [*PURPOSES["reward"].reads, *IMAGE_COLUMNS, ROW_NAME]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """TRL's loss, plus `mean_reward_coefficient` times |mean(chosen + rejected)|."""
        with_images = self.judge_template is not None
        if with_images:
            self._check_images(model, inputs)
        computed = super().compute_loss(model, inputs, True, num_items_in_batch)
        assert isinstance(computed, tuple)  # as it is with outputs
        loss, outputs = computed
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        if self.args.mean_reward_coefficient is not None:
            loss = loss + self.args.mean_reward_coefficient * self._mean_reward_penalty(chosen, rejected)
        if with_images:
            self._remember(torch.stack((chosen, rejected), dim=1).detach())
        return (loss, outputs) if return_outputs else loss

    def _mean_reward_penalty(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """This process's part of |mean over the pairs of all processes|: the mean over processes is exact.

        Differs from the public code of Fact-RLHF, where each device penalizes the mean of its own pairs.
        """
        local = (chosen + rejected).detach().mean()
        everywhere = gathered(self.accelerator, local).mean()
        return mean_reward_penalty(chosen, rejected) * local.sign() * everywhere.sign()

    def _check_images(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Stops where all processes would otherwise wait for each other, and before a blind model is trained."""
        sharded = self.is_fsdp_enabled or _zero_stage(self) == 3
        if self._pixels_are_checked and not sharded:
            return
        has_images = torch.tensor([float("pixel_values" in inputs)], device=self.accelerator.device)
        everywhere = gathered(self.accelerator, has_images)
        if sharded:
            refuse_images_on_some_processes(everywhere)
        if not self._pixels_are_checked and model.training and everywhere.all():
            self._check_pixels(model, inputs)

    @torch.no_grad()
    def _check_pixels(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        model.eval()  # dropout would make any two passes differ
        scores = model(**inputs, use_cache=False).logits
        changed = {**inputs, "pixel_values": other_pixels(inputs["pixel_values"])}
        other_scores = model(**changed, use_cache=False).logits
        model.train()
        if scores.any() or other_scores.any():  # a head that is still zero proves nothing
            check_depends_on_pixels(scores, other_scores, "scores")
            self._pixels_are_checked = True

    def _remember(self, scores: Tensor) -> None:
        """Keeps the scores of the pairs of all processes, (P, 2) each, for the next log."""
        if self.model.training:
            self._scores["train"].append(gathered(self.accelerator, scores))
        else:
            # At the end of an evaluation this leaves out the pairs that fill up the last batch.
            of_pairs = self.accelerator.gather_for_metrics(scores)
            assert isinstance(of_pairs, Tensor)
            self._scores["eval"].append(of_pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With images: TRL's metrics over all pairs since the last log, and the distribution of the scores."""
        mode = "train" if self.model.training else "eval"
        if self._scores[mode]:
            statistics = score_statistics(torch.cat(self._scores.pop(mode)))
            self._metrics[mode].update({name: [value] for name, value in statistics.items()})
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; the metrics are those of this evaluation alone."""
        self._scores.pop("eval", None)
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None, Any]:
        """With images: predictions (P, 2), one row per pair, so that `Trainer` gathers and truncates them by pairs."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if self.judge_template is not None and logits is not None:
            logits = torch.cat(logits.chunk(2), dim=1)  # (2P, 1) -> (P, 2)
        return loss, logits, labels

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves model, head and processor, and with images the judge template beside them."""
        if self.judge_template is not None and self.args.should_save:
            # First, since a push to the hub happens inside.
            folder = output_dir or self.args.output_dir
            assert folder is not None  # TRL's configurations have a default
            self.judge_template.save_pretrained(folder)
        super().save_model(output_dir, _internal_call)


def _let_parameters_be_unused(args: RewardConfig) -> None:
    """Lets DDP train when a batch leaves parameters out: those of the vision tower, in a batch without images.

    The towers of the LLaVA family also hold layers that are never read. `Trainer` turns the search for unused
    parameters off with gradient checkpointing, which TRL turns on; it only breaks the reentrant kind.
    """
    checkpointing = args.gradient_checkpointing_kwargs or {}
    assert not isinstance(checkpointing, str)  # the arguments have parsed it
    reentrant = checkpointing.get("use_reentrant", False)
    if args.ddp_find_unused_parameters is None and not reentrant:
        args.ddp_find_unused_parameters = True


def _zero_stage(trainer: trl.RewardTrainer) -> int:
    plugin = trainer.accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage
