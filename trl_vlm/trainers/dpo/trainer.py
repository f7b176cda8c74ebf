"""TRL's `DPOTrainer` for images: prompts computed once, Dense DPO, several rejected replies, a reference on disk."""

import contextlib
import copy
import functools
import logging
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from peft import PeftConfig
from torch import Tensor, nn

from trl_vlm.data.rows import PAIR_COLUMNS, ROW_NAME
from trl_vlm.models.prefix_sharing.sharing import share_prefix
from trl_vlm.pairs.source import PairSource
from trl_vlm.trainers import _trl
from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.card import CardFacts
from trl_vlm.trainers.checks import check_log_probs, refuse
from trl_vlm.trainers.dpo import fresh_pairs, pairs_data, setup
from trl_vlm.trainers.dpo import metrics as dpo_metrics
from trl_vlm.trainers.dpo.card import card_facts
from trl_vlm.trainers.dpo.collator import CHANGED, NUM_REPLIES, REFERENCE, PreferenceCollator, SegmentOptions
from trl_vlm.trainers.dpo.config import LENGTH_NORMALIZED, DPOConfig
from trl_vlm.trainers.dpo.degeneration import DegenerationWatch
from trl_vlm.trainers.dpo.distortion import DISTORTED, DistortedReplies, DistortingCollator
from trl_vlm.trainers.dpo.fresh_pairs import WEIGHTLESS, FreshPairs, has_pair, without_replies
from trl_vlm.trainers.dpo.log_probs import DenseScore, attach, sequences
from trl_vlm.trainers.dpo.pair_loss import NO_REFERENCE, PairLoss, check_pair_loss, mean_pair_loss
from trl_vlm.trainers.dpo.reference_cache import filled_for
from trl_vlm.trainers.ppo.rollout_rows import rollout_rows
from trl_vlm.trainers.preparation import PreparedTrainer, complete_arguments, complete_processor, prepare_model

logger = logging.getLogger(__name__)

# What TRL reads of a batch beside the model.
NOT_FOR_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class DPOTrainer(PreparedTrainer, trl.DPOTrainer):
    """A drop-in for `trl.DPOTrainer`; `DPOConfig` lists what it adds.

    With nothing of ours set it gives TRL's losses and metrics, in less time on a vision-language model, because a
    prompt and its images are computed once for both replies. Rows may hold `rejected_extra` (further rejected
    replies), `chosen_spans` and `rejected_spans` (the corrected characters); docs/methods/dpo.md has the formulas.

    Args:
        model: as in TRL.
        ref_model: as in TRL.
        args: `DPOConfig`, ours or TRL's.
        data_collator: as in TRL; with a collator of your own, prefix sharing and Dense DPO are off or refused.
        train_dataset: as in TRL, with any of the columns above.
        eval_dataset: as in TRL.
        processing_class: as in TRL. Unset, it is loaded in the variant that can train (PaliGemma; no torchvision).
        compute_metrics: as in TRL.
        callbacks: as in TRL.
        optimizers: as in TRL.
        quantization_config: as in TRL.
        peft_config: as in TRL; `target_modules` may be "language-model" or "language-model-and-projector".
        pair_source: makes the pairs of every step with the current policy. Rows then need `prompt` and what the
            source reads: often `completion` (or `chosen`), never `rejected`.
        pair_loss: takes the place of TRL's losses: the scores of chosen and rejected replies, (P,) each, of the
            policy and then of the reference -> losses, (P,). With `reference_free` the reference's are None.
        kwargs: what a later TRL adds.
    """

    _tag_names = ["trl", "dpo", "trl-vlm"]

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: trl.DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        pair_source: PairSource | None = None,
        pair_loss: PairLoss | None = None,
        **kwargs: Any,
    ):
        args = complete_arguments(args, model, DPOConfig)
        if not args.reference_free:
            setup.refuse_unknown_reference(model, ref_model, peft_config, args)
        processing_class = complete_processor(processing_class, model, args)
        self._has_own_collator = data_collator is not None
        if pair_source is None:
            check = (args.bad_pairs, processing_class, self._has_own_collator)
            pairs = [pairs_data.checked_pairs(train_dataset, "train", *check)]
            pairs += [pairs_data.checked_pairs(eval_dataset, "eval", *check)]
            train_dataset, eval_dataset = map(pairs_data.for_trl, pairs)
        else:
            fresh_pairs.check_arguments(args, processing_class, data_collator)
            train_dataset = fresh_pairs.checked_rows(train_dataset, "train", processing_class)
            eval_dataset = fresh_pairs.checked_rows(eval_dataset, "eval", processing_class)
            args.remove_unused_columns = False  # a source may read any column
        check_pair_loss(pair_loss, args, ref_model)
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
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=complete_peft_config(peft_config, model, args),
            **kwargs,
        )
        _trl.check_attributes(self)
        check_log_probs(self._base_model)
        self._dense = self._dense_score(args)
        self._refuse_what_does_not_combine(args, own_collator=data_collator is not None)
        if self._is_vlm or args.freeze_vision_tower:
            prepare_model(self._base_model, args)
        self._shares = self._set_up_forwards(own_collator=data_collator is not None)
        make_collator = functools.partial(self._preference_collator, self.data_collator)
        self._pair_maker: FreshPairs | None = None
        if pair_source is not None:
            self._pair_maker, self.data_collator = FreshPairs(self, pair_source, make_collator), list
            self.train_dataset = rollout_rows(self.train_dataset, "train")
            self.eval_dataset = rollout_rows(self.eval_dataset, "eval")
        elif self._is_vision_dataset:
            self.train_dataset, self.eval_dataset = map(pairs_data.named, pairs)
        if pair_source is None and data_collator is None:
            self.data_collator = make_collator(self._num_extra_rejected)
        if args.reference_cache is not None:
            self._fill_reference_cache()
        if args.degeneration_steps is not None:
            self.add_callback(DegenerationWatch(self))

    def card_facts(self) -> CardFacts:
        """What the model card says of this run."""
        return card_facts(self, self._pair_maker and self._pair_maker.source)

    @property
    def _base_model(self) -> nn.Module:
        """The model without PEFT's wrapper."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference; None if it is the policy without its adapter, or on disk, or there is none."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: nn.Module | None) -> None:
        self._ref_model = None if model is NO_REFERENCE else model

    def _dense_score(self, args: DPOConfig) -> DenseScore | None:
        if args.dense_gamma is None:
            return None
        return DenseScore(
            args.dense_gamma,
            args.dense_reduction,
            per_token=self.pair_loss is None and bool(LENGTH_NORMALIZED & set(args.loss_type)),
        )

    def _segment_options(self, args: DPOConfig) -> SegmentOptions | None:
        return None if args.dense_gamma is None else SegmentOptions(args.dense_min_match, args.dense_two_sided)

    def _preference_collator(self, collate: Any, extra: int) -> PreferenceCollator | DistortingCollator:
        """TRL's collator with what we add, for rows with so many further rejected replies."""
        args, with_noise = self.args, self.args.povid_loss is not None
        made = PreferenceCollator(
            copy.copy(collate),
            vision=self._is_vision_dataset,
            tokenizer=self._tokenizer,
            extra=extra + with_noise,  # one more rejected reply per row
            share=self._shares,
            segments=self._segment_options(args),
            count_image_tokens=args.check_image_tokens,
        )
        if not with_noise:
            return made
        return DistortingCollator(made, self.processing_class, args.noise_steps, args.noise_overflow)

    def _refuse_what_does_not_combine(self, args: DPOConfig, own_collator: bool) -> None:
        needs_collator = {
            "Dense DPO": args.dense_gamma is not None,
            "`rejected_extra`": self._num_extra_rejected > 0,
            "`reference_cache`": args.reference_cache is not None,
            "`povid_loss`": args.povid_loss is not None,
        }
        for name, is_needed in needs_collator.items():
            if is_needed and own_collator:
                raise ValueError(f"{name} needs the trainer's own collator. Leave out `data_collator`.")
        if self._num_extra_rejected > 0 or args.povid_loss is not None:
            one_pair = "it is made for one pair per row"
            refuse(
                "`rejected_extra` (and `povid_loss`, which adds one)",
                {
                    "`precompute_ref_log_probs`": (
                        args.precompute_ref_log_probs,
                        f"{one_pair} (see `reference_cache`)",
                    ),
                    "The auxiliary loss of mixtures of experts": (self.aux_loss_enabled, one_pair),
                    "`compute_metrics`": (self.compute_metrics is not None, one_pair),
                },
            )
        if self.pair_loss is not None:
            reason = "TRL adds it to its own losses (see `router_aux_loss_coef`)"
            refuse("`pair_loss`", {"The auxiliary loss of mixtures of experts": (self.aux_loss_enabled, reason)})
        if args.reference_cache is not None and isinstance(self.train_dataset, IterableDataset):
            raise ValueError("`reference_cache` needs a dataset with rows by index, not a stream. Unset it.")

    # Forwards

    def _set_up_forwards(self, own_collator: bool) -> bool:
        """Put our adapter around TRL's fused forwards; returns whether they share prefixes."""
        models = [self._base_model]
        distortion = None if self.args.povid_loss is None else DistortedReplies(self.args.povid_loss == "shared")
        if self.ref_model is not None:
            models.append(self.accelerator.unwrap_model(self.ref_model))
        reason = setup.why_no_shared_prefix(self, models, own_collator)
        if self.args.share_prefix and reason is not None and self._is_vlm and self.accelerator.is_main_process:
            logger.warning("Prompts are computed once per reply, not once per row: %s.", reason)
        for model in models:
            attach(model, distortion)
            if reason is None:
                share_prefix(model)
        return reason is None

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = [] if self._has_own_collator else ["prompt", *PAIR_COLUMNS, "rejected_extra_ids", ROW_NAME]
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if args.povid_loss is not None:  # rows with images are not prepared here
            raise ValueError("`povid_loss` puts noise on images, and the rows have no column `images`. Unset it.")
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not self._num_extra_rejected:
            return prepared

        def prepare(one: Any) -> Any:
            return super(DPOTrainer, self)._prepare_dataset(one, processing_class, args, dataset_name)

        return pairs_data.prepared_extras(dataset, prepared, prepare, self._num_extra_rejected, dataset_name)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation; rows with images that are passed here are checked and named as well."""
        if self._is_vision_dataset and self._pair_maker is None:
            eval_dataset = pairs_data.for_evaluation(eval_dataset, self.processing_class, self._has_own_collator)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def prompt_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch that begins with the prompts of `rows`, whatever replies follow."""
        collate = self.data_collator if self._pair_maker is None else self._pair_maker.collated
        has_replies = [not self._is_vision_dataset or has_pair(row) for row in rows]
        return collate([row if has else without_replies(row) for row, has in zip(rows, has_replies, strict=True)])

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        if self._pair_maker is not None and isinstance(inputs, list):
            inputs = self._pair_maker.batch(inputs)
        return super()._prepare_inputs(inputs)

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The mean of the losses of all pairs, from one forward of the policy and one of the reference."""
        inputs = dict(inputs)
        is_weightless, num_replies = inputs.pop(WEIGHTLESS, False), inputs.pop(NUM_REPLIES, 2)
        reference, is_changed = inputs.pop(REFERENCE, None), inputs.pop(CHANGED, None)
        arguments = self._model_arguments(inputs)
        policy = model(**arguments)
        if is_weightless:
            loss = 0.0 * policy.log_probs.sum()
        else:
            if reference is None and not (self._is_reference_free or self.precompute_ref_logps):
                reference = self._reference_log_probs(self.ref_model or self.model, arguments)
            loss = self._mean_over_pairs(policy, reference, inputs, is_changed, num_replies)
            self._log_tokens(policy.log_probs.detach(), reference, inputs["completion_mask"], is_changed, num_replies)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{key: arguments[key] for key in arguments if key not in ("labels", "fused_lm_head")})

    def _model_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a fused forward reads of a batch."""
        arguments = {key: value for key, value in inputs.items() if key not in NOT_FOR_MODEL}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return arguments | {"labels": labels, "use_cache": False, "fused_lm_head": True}

    def _mean_over_pairs(
        self,
        policy: Any,
        reference: Tensor | None,
        inputs: dict[str, Any],
        is_changed: Tensor | None,
        num_replies: int,
    ) -> Tensor:
        """Mean of the losses over the pairs (chosen, each rejected reply) of a row; one pair weighs 1.

            w L(chosen, rejected) + (1 - w) / n * (sum over n extras of L(chosen, extra))

        Source: arXiv:2407.02477, equation 5, for n = 1.
        """
        rows, extra, first = len(inputs["input_ids"]) // num_replies, num_replies - 2, self.args.rejected_weight
        weights = [first, *[(1 - first) / extra] * extra] if extra else [1.0]
        total = 0.0
        with self._reference_in_batch():
            for number, weight in enumerate(weights):
                place = torch.cat([torch.arange(rows), torch.arange(rows) + (number + 1) * rows])
                pair = inputs | {key: inputs[key][place] for key in ("input_ids", "completion_mask")}
                # TRL only counts its tokens any more: those of the whole batch, and once.
                pair["attention_mask"] = inputs["attention_mask"] * (number == 0)
                changed = None if is_changed is None else is_changed[number]
                total = total + weight * self._loss_of(pair, policy, reference, place, changed)
        return total

    def _loss_of(
        self, pair: dict[str, Any], policy: Any, reference: Tensor | None, place: Tensor, is_changed: Tensor | None
    ) -> Tensor:
        """TRL's loss of the sequences `place` of a batch, or that of `pair_loss`; TRL logs its metrics of both."""
        is_reply = pair["completion_mask"][:, 1:].bool()
        dense = None if is_changed is None else functools.partial(self._dense.apply, is_changed=is_changed)
        output = sequences(policy, place, is_reply, dense)
        if reference is not None:
            log_probs = _trl.FusedCausalLMOutput(log_probs=reference.to(policy.log_probs.device))
            scored = sequences(log_probs, place, is_reply, dense)
            chosen, rejected = self.compute_ref_log_probs(lambda **_: scored, pair)
            pair |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        if self.pair_loss is None:
            return super()._compute_loss(lambda **_: output, pair, False)
        scores = (*output.log_probs.sum(1).chunk(2), pair.get("ref_chosen_logps"), pair.get("ref_rejected_logps"))
        if reference is None:
            zeros = torch.zeros_like(scores[0], requires_grad=False)
            pair |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
        with torch.no_grad():
            super()._compute_loss(lambda **_: output, pair, False)
        return mean_pair_loss(self.pair_loss, *scores)

    def _reference_log_probs(self, reference: Any, arguments: dict[str, Any]) -> Tensor:
        """(N, T - 1), from the reference model, or from the policy without its adapter, as TRL does."""
        arguments = {key: value for key, value in arguments.items() if key != "output_router_logits"}
        if DISTORTED in arguments:
            arguments[DISTORTED] = arguments[DISTORTED] | {"is_reference": True}
        adapter = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = _trl.use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        kwargs = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), _trl.disable_gradient_checkpointing(self.model, kwargs), adapter:
            return reference(**arguments).log_probs

    @contextlib.contextmanager
    def _reference_in_batch(self) -> Any:
        """Let TRL read the reference off the batch."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    def _log_tokens(
        self,
        policy: Tensor,
        reference: Tensor | None,
        completion_mask: Tensor,
        is_changed: Tensor | None,
        num_replies: int,
    ) -> None:
        """Log what TRL's metrics of whole replies do not show."""
        wants_drift = self.args.degeneration_steps is not None
        if (is_changed is None and not wants_drift) or reference is None:
            return
        is_reply = completion_mask[:, 1:].bool()
        width = is_reply.size(1)
        ratios = policy[:, -width:] - reference.to(policy.device)[:, -width:]
        metrics = self._metrics["train" if self.model.training else "eval"]
        gather = self.accelerator.gather
        if is_changed is not None:
            dense = dpo_metrics.dense_metrics(ratios, is_changed, is_reply, gather)
            self._pairs_without_change += dense.pop("dense/pairs_without_change")
            metrics["dense/pairs_without_change"] = [self._pairs_without_change]
            for name, value in dense.items():
                metrics[name].append(value)
        if wants_drift:
            for name, value in dpo_metrics.drift_metrics(ratios, is_reply, num_replies, gather).items():
                metrics[name].append(value)

    # Reference on disk

    def _fill_reference_cache(self) -> None:
        self.data_collator.reference = filled_for(self, self._score_reference).of_row
        self.ref_model, self.precompute_ref_logps = None, True

    def _score_reference(self, reference: Any, batch: dict[str, Tensor]) -> Tensor:
        batch = self._prepare_inputs(batch)
        ours = (CHANGED, NUM_REPLIES)  # the cache holds what no weighting has touched
        arguments = self._model_arguments({key: value for key, value in batch.items() if key not in ours})
        with self.accelerator.autocast():
            log_probs = self._reference_log_probs(reference, arguments)
        return log_probs[:, -(batch["input_ids"].size(1) - 1) :]
