"""TRL's `DPOTrainer` for images: prompts computed once, Dense DPO, several rejected replies, a reference on disk."""

import contextlib
import copy
import functools
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
)

from trl_vlm.data.rows import PAIR_COLUMNS, REJECTED_IMAGES, ROW_NAME
from trl_vlm.models.prefix_sharing.sharing import share_prefix
from trl_vlm.pairs.source import PairSource
from trl_vlm.trainers import _trl
from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.attributes import with_attributes
from trl_vlm.trainers.card import CardFacts
from trl_vlm.trainers.checks import check_log_probs
from trl_vlm.trainers.dpo import fresh_pairs, pairs_data, setup
from trl_vlm.trainers.dpo import metrics as dpo_metrics
from trl_vlm.trainers.dpo.card import card_facts
from trl_vlm.trainers.dpo.collator import NUM_REPLIES, REFERENCE, PreferenceBatch, PreferenceCollator
from trl_vlm.trainers.dpo.config import DPOConfig
from trl_vlm.trainers.dpo.degeneration import DegenerationWatch
from trl_vlm.trainers.dpo.distortion import DISTORTED, DistortedReplies, DistortingCollator
from trl_vlm.trainers.dpo.epoch_draws import EpochDraws
from trl_vlm.trainers.dpo.fresh_pairs import WEIGHTLESS, FreshPairs
from trl_vlm.trainers.dpo.image_collator import IMAGE_PAIR, ImagePairCollator
from trl_vlm.trainers.dpo.image_preference import NOTHING_INSIDE, ImagePreference, InsideScores, with_scores
from trl_vlm.trainers.dpo.log_probs import Scored, attach, sequences
from trl_vlm.trainers.dpo.pair_loss import NO_REFERENCE, PairLoss, check_pair_loss, mean_pair_loss
from trl_vlm.trainers.dpo.paired import PairedTrainer
from trl_vlm.trainers.dpo.reference_cache import filled_for
from trl_vlm.trainers.dpo.segments import Segments
from trl_vlm.trainers.dpo.vllm import VLLMReplies, check_vllm
from trl_vlm.trainers.image_features import FeaturesPerBatch, features_of_run
from trl_vlm.trainers.ppo.rollout_rows import rollout_rows
from trl_vlm.trainers.preparation import PreparedTrainer, complete_arguments, complete_processor, prepare_model
from trl_vlm.trainers.types import EvaluationRows, Model, Optimizers, Processor, Rows, base_model, gathered, unwrapped

logger = logging.getLogger(__name__)

NOT_FOR_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")  # TRL reads them outside the model


class DPOTrainer(FeaturesPerBatch, PreparedTrainer, PairedTrainer, trl.DPOTrainer):
    """A drop-in for `trl.DPOTrainer`; `DPOConfig` lists what it adds.

    With none of our options set, it gives TRL's losses and metrics, in less time on a vision-language model, because
    a prompt and its images are computed once for both replies. Rows may hold `rejected_extra` (further rejected
    replies), `chosen_spans` and `rejected_spans` (the corrected characters); docs/methods/dpo.md has the formulas.

    Args:
        model: As in TRL.
        ref_model: As in TRL.
        args: `DPOConfig`, ours or TRL's.
        data_collator: As in TRL; with a collator of your own, prefix sharing and Dense DPO are off or refused.
        train_dataset: As in TRL, with any of the columns above.
        eval_dataset: As in TRL.
        processing_class: As in TRL. Unset, it is loaded in the variant that can train (PaliGemma; no torchvision).
        compute_metrics: As in TRL.
        callbacks: As in TRL.
        optimizers: As in TRL.
        quantization_config: As in TRL.
        peft_config: As in TRL; `target_modules` may be "language-model" or "language-model-and-projector".
        pair_source: Makes the pairs of every step with the current policy. Rows then need `prompt` and what the
            source reads: often `completion` (or `chosen`), never `rejected`.
        pair_loss: Takes the place of TRL's losses: the scores of chosen and rejected replies, (P,) each, of the
            policy and then of the reference -> losses, (P,). With `reference_free` the reference's are None.
        kwargs: Arguments that a later TRL adds.
    """

    args: DPOConfig
    # Set in TRL's constructor without type annotations.
    data_collator: Callable[[list[Any]], Any]
    eval_dataset: Any
    precompute_ref_logps: bool

    _tag_names = ["trl", "dpo", "trl-vlm"]

    def __init__(
        self,
        model: str | Model,
        ref_model: PreTrainedModel | None = None,
        args: trl.DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvaluationRows | None = None,
        processing_class: Processor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Optimizers = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        pair_source: PairSource | None = None,
        pair_loss: PairLoss | None = None,
        **kwargs: Any,
    ):
        args = complete_arguments(args, model, DPOConfig)
        if not args.reference_free:
            setup.refuse_unknown_reference(model, ref_model, peft_config, args)
        processor = complete_processor(processing_class, model, args)
        self._has_own_collator = data_collator is not None
        pairs, datasets = None, (train_dataset, eval_dataset)
        if pair_source is None:
            pairs = pairs_data.checked_data(*datasets, args.bad_pairs, processor, self._has_own_collator)
            train_dataset, eval_dataset = pairs.for_trl()
        else:
            train_dataset, eval_dataset = fresh_pairs.checked_data(*datasets, args, processor, data_collator)
        check_pair_loss(pair_loss, args, ref_model)
        check_vllm(args, pair_source)
        setup.refuse_unread_columns(train_dataset, args)
        self._num_extra_rejected = pairs_data.extra_replies(train_dataset)
        self._pairs_without_change = 0
        self.pair_loss, self._is_reference_free = pair_loss, args.reference_free
        super().__init__(
            model,
            ref_model=NO_REFERENCE if args.reference_free else ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=complete_peft_config(peft_config, model, args),
            **kwargs,
        )
        _trl.check_attributes(self)
        check_log_probs(self._base_model)
        self._finish(pair_source, pairs)

    def _finish(self, pair_source: PairSource | None, pairs: pairs_data.CheckedData | None) -> None:
        """The part of the constructor that follows TRL's."""
        args = self.args
        self._dense = setup.dense_score(args, has_pair_loss=self.pair_loss is not None)
        setup.refuse_what_does_not_combine(
            self, self._num_extra_rejected, self._has_own_collator, self.pair_loss is not None
        )
        if self._is_vlm or args.freeze_vision_tower:
            prepare_model(self._base_model, args)
        self._shares = self._set_up_forwards()
        self._image_preference = ImagePreference(self)
        self._image_features = features_of_run(self, {"policy": self.model, "reference": self.ref_model})
        self._epoch_draws = EpochDraws(args.seed)
        self.add_callback(self._epoch_draws)
        make_collator = functools.partial(self._preference_collator, self.data_collator)
        if pair_source is not None:
            engine = VLLMReplies(self, args) if args.use_vllm else None
            self._pair_maker, self.data_collator = FreshPairs(self, pair_source, make_collator, engine), list
            self.train_dataset = rollout_rows(self.train_dataset, "train")
            self.eval_dataset = rollout_rows(self.eval_dataset, "eval")
        elif pairs is not None and self._is_vision_dataset:
            self.train_dataset, self.eval_dataset = pairs.named()
        if pair_source is None and not self._has_own_collator:
            self.data_collator = make_collator(self._num_extra_rejected)
        if args.reference_cache is not None:
            self._fill_reference_cache()
        if args.degeneration_steps is not None:
            self.add_callback(DegenerationWatch(self))

    def card_facts(self) -> CardFacts:
        """The facts of this run for the model card."""
        return card_facts(self, self._pair_maker and self._pair_maker.source)

    @property
    def _base_model(self) -> PreTrainedModel:
        """The model without PEFT's wrapper."""
        return base_model(self.model)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference; None if it is the policy without its adapter, is cached on disk, or is not needed."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: nn.Module | None) -> None:
        self._ref_model = None if model is NO_REFERENCE else model

    def _preference_collator(self, collate: Any, extra: int) -> setup.PairsCollator:
        """TRL's collator with our additions, for rows with `extra` further rejected replies."""
        args, with_noise = self.args, self.args.povid_loss is not None
        made = PreferenceCollator(
            copy.copy(collate),
            vision=self._is_vision_dataset,
            tokenizer=self._tokenizer,
            extra=extra + with_noise,  # one more rejected reply per row
            shares_prefix=self._shares,
            segments=setup.segment_options(args),
            count_image_tokens=args.check_image_tokens,
        )
        collator: PreferenceCollator | DistortingCollator = made
        if with_noise:
            assert isinstance(self.processing_class, ProcessorMixin)  # rows without images are refused
            collator = DistortingCollator(
                made, self.processing_class, self._epoch_draws, args.noise_steps, args.noise_overflow
            )
        return setup.with_image_pair(self, collator, made, self._epoch_draws) if args.has_image_pair else collator

    # Forwards

    def _set_up_forwards(self) -> bool:
        """Puts our adapter around TRL's fused forwards; returns whether they share prefixes."""
        models = [self._base_model]
        distortion = None if self.args.povid_loss is None else DistortedReplies(self.args.povid_loss == "shared")
        if self.ref_model is not None:
            reference = unwrapped(self.accelerator, self.ref_model)
            assert isinstance(reference, PreTrainedModel)  # as TRL takes it
            models.append(reference)
        reason = setup.why_no_shared_prefix(self, models, self._has_own_collator)
        if self.args.share_prefix and reason is not None and self._is_vlm and self.accelerator.is_main_process:
            logger.warning("Prompts are computed once per reply, not once per row: %s.", reason)
        for model in models:
            attach(model, distortion)
            if reason is None:
                share_prefix(model, is_tested=not self.args.use_liger_kernel)
        return reason is None

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = ["prompt", *PAIR_COLUMNS, REJECTED_IMAGES, "rejected_extra_ids", ROW_NAME]
        ours = [] if self._has_own_collator else ours
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def _prepare_dataset(self, dataset: Rows, processing_class: Processor, args: DPOConfig, dataset_name: str) -> Rows:
        if args.povid_loss is not None:  # rows with images are not prepared here
            raise ValueError("`povid_loss` puts noise on images, and the rows have no column `images`. Unset it.")
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not self._num_extra_rejected:
            return prepared

        def prepare(one: Dataset) -> Rows:
            return super(DPOTrainer, self)._prepare_dataset(one, processing_class, args, dataset_name)

        return pairs_data.prepared_extras(dataset, prepared, prepare, self._num_extra_rejected, dataset_name)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; rows with images that are passed here are checked and named as well."""
        if self._is_vision_dataset and self._pair_maker is None:
            eval_dataset = pairs_data.for_evaluation(eval_dataset, self.processing_class, self._has_own_collator)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The mean of the losses of all pairs, from one forward of the policy and one of the reference."""
        inputs = dict(inputs)
        is_weightless, num_replies = inputs.pop(WEIGHTLESS, False), inputs.pop(NUM_REPLIES, 2)
        reference, segments = inputs.pop(REFERENCE, None), Segments.taken_from(inputs)
        corrupted = inputs.pop(IMAGE_PAIR, None)
        arguments = self._model_arguments(inputs)
        policy = model(**arguments)
        if is_weightless:
            loss = 0.0 * policy.log_probs.sum()
        else:
            if reference is None and not (self._is_reference_free or self.precompute_ref_logps):
                reference = self._reference_log_probs(self.ref_model or self.model, arguments)
            batch = Scored(inputs, policy, reference, segments, num_replies)
            image = None if corrupted is None else self._image_preference.pair(model, corrupted, batch)
            loss = self._image_preference.total(functools.partial(self._mean_over_pairs, batch), batch, image)
            self._log_tokens(batch)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{key: arguments[key] for key in arguments if key not in ("labels", "fused_lm_head")})

    def _model_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a fused forward."""
        arguments = {key: value for key, value in inputs.items() if key not in NOT_FOR_MODEL}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return arguments | {"labels": labels, "use_cache": False, "fused_lm_head": True}

    def _mean_over_pairs(self, batch: Scored, inside: InsideScores = NOTHING_INSIDE) -> Tensor:
        """Mean of the losses over the pairs (chosen, each rejected reply) of a row; one pair weighs 1.

            w L(chosen, rejected) + (1 - w) / n * (sum over n extras of L(chosen, extra))

        Source: arXiv:2407.02477, equation 5, for n = 1.
        """
        rows, inputs, extra, first = batch.rows, batch.inputs, batch.num_replies - 2, self.args.rejected_weight
        weights = [first, *[(1 - first) / extra] * extra] if extra else [1.0]
        losses = []
        with with_attributes(self, precompute_ref_logps=True):  # TRL reads the reference from the batch
            for number, weight in enumerate(weights):
                place = torch.cat([torch.arange(rows), torch.arange(rows) + (number + 1) * rows])
                pair = inputs | {key: inputs[key][place] for key in ("input_ids", "completion_mask")}
                # TRL uses it only to count tokens: those of the whole batch, once.
                pair["attention_mask"] = inputs["attention_mask"] * (number == 0)
                own = None if batch.segments is None else batch.segments.of_pair(number)
                losses.append(weight * self._loss_of(pair, batch.policy, batch.reference, place, own, inside))
        return functools.reduce(operator.add, losses)

    def _loss_of(
        self,
        pair: dict[str, Any],
        policy: Any,
        reference: Tensor | None,
        place: Tensor,
        segments: dict[str, Tensor | None] | None,
        inside: InsideScores = NOTHING_INSIDE,
    ) -> Tensor:
        """The loss of TRL, or of `pair_loss`, for the sequences `place` of a batch; TRL logs its metrics of both."""
        is_reply = pair["completion_mask"][:, 1:].bool()
        dense = None
        if segments is not None:
            assert self._dense is not None  # only then the collator finds changes
            dense = functools.partial(self._dense.apply, **segments)
        output = with_scores(sequences(policy, place, is_reply, dense), inside.policy)
        if reference is not None:
            log_probs = _trl.FusedCausalLMOutput(log_probs=reference.to(policy.log_probs.device))
            scored = with_scores(sequences(log_probs, place, is_reply, dense), inside.reference)
            ref_chosen, ref_rejected = self.compute_ref_log_probs(lambda **_: scored, pair)
            pair |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        if self.pair_loss is None:
            return super()._compute_loss(lambda **_: output, pair, False)
        assert output.log_probs is not None  # of a fused forward
        chosen, rejected = output.log_probs.sum(1).chunk(2)
        reference_scores = (pair.get("ref_chosen_logps"), pair.get("ref_rejected_logps"))
        if reference is None:
            zeros = torch.zeros_like(chosen, requires_grad=False)
            pair |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
        with torch.no_grad():
            super()._compute_loss(lambda **_: output, pair, False)
        return mean_pair_loss(self.pair_loss, chosen, rejected, *reference_scores)

    def _reference_log_probs(self, reference: Any, arguments: dict[str, Any]) -> Tensor:
        """(N, T - 1), from the reference model, or from the policy without its adapter, as TRL does."""
        arguments = {key: value for key, value in arguments.items() if key != "output_router_logits"}
        if DISTORTED in arguments:
            arguments[DISTORTED] = arguments[DISTORTED] | {"is_reference": True}
        adapter, policy = contextlib.nullcontext(), unwrapped(self.accelerator, self.model)
        if self.ref_model is None and isinstance(policy, PeftModel):
            adapter = _trl.use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        kwargs = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), _trl.disable_gradient_checkpointing(self.model, kwargs), adapter:
            return reference(**arguments).log_probs

    def _log_tokens(self, batch: Scored) -> None:
        """Logs metrics per token, beyond TRL's of whole replies."""
        if batch.reference is None:
            return
        is_changed = None if batch.segments is None else batch.segments.is_changed
        measured = dpo_metrics.token_metrics(
            batch.policy.log_probs.detach(),
            batch.reference[: len(batch.inputs["input_ids"])],
            batch.inputs["completion_mask"][:, 1:].bool(),
            is_changed,
            batch.num_replies if self.args.degeneration_steps is not None else None,
            functools.partial(gathered, self.accelerator),
        )
        metrics = self._metrics["train" if self.model.training else "eval"]
        if is_changed is not None:
            self._pairs_without_change += int(measured.pop("dense/pairs_without_change"))
            metrics["dense/pairs_without_change"] = [self._pairs_without_change]
        for name, value in measured.items():
            metrics[name].append(value)

    # Reference on disk

    def _fill_reference_cache(self) -> None:
        assert isinstance(self.data_collator, PreferenceCollator | ImagePairCollator)  # another one is refused
        self.data_collator.reference = filled_for(self, self._score_reference).of_row
        self.ref_model, self.precompute_ref_logps = None, True

    def _score_reference(self, reference: nn.Module, batch: PreferenceBatch) -> Tensor:
        inputs = self._prepare_inputs({**batch})
        Segments.taken_from(inputs)  # the cache holds unweighted log-probabilities
        corrupted = inputs.pop(IMAGE_PAIR, None)
        arguments = self._model_arguments({key: value for key, value in inputs.items() if key != NUM_REPLIES})
        with self.accelerator.autocast():
            log_probs = self._reference_log_probs(reference, arguments)[:, -(inputs["input_ids"].size(1) - 1) :]
            if corrupted is None:
                return log_probs
            further = self._image_preference.reference_under_corrupted(reference, corrupted, inputs)
        return torch.cat([log_probs, further])
