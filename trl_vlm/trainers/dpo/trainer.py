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

from trl_vlm.models.prefix_sharing.sharing import share_prefix
from trl_vlm.pairs.source import PairSource
from trl_vlm.trainers import _trl
from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.dpo import fresh_pairs, setup
from trl_vlm.trainers.dpo import metrics as dpo_metrics
from trl_vlm.trainers.dpo.collator import PreferenceCollator, SegmentOptions
from trl_vlm.trainers.dpo.config import LENGTH_NORMALIZED, DPOConfig
from trl_vlm.trainers.dpo.degeneration import DegenerationWatch
from trl_vlm.trainers.dpo.distortion import DistortedReplies, DistortingCollator
from trl_vlm.trainers.dpo.fresh_pairs import WEIGHTLESS, FreshPairs, has_pair, without_replies
from trl_vlm.trainers.dpo.log_probs import CHANGED, PER_TOKEN, DenseScore, ReplyLogProbs
from trl_vlm.trainers.dpo.reference_cache import filled_for
from trl_vlm.trainers.ppo.rollout_rows import rollout_rows
from trl_vlm.trainers.preparation import PreparedTrainer, complete_arguments, complete_processor, prepare_model

logger = logging.getLogger(__name__)

REFERENCE = "reference_log_probs"
PAIR_KEYS = ("input_ids", "attention_mask", "completion_mask")


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
        kwargs: what a later TRL adds.
    """

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
        **kwargs: Any,
    ):
        args = complete_arguments(args, model, DPOConfig)
        setup.refuse_unknown_reference(model, ref_model, peft_config, args)
        processing_class = complete_processor(processing_class, model, args)
        if pair_source is None:
            train_dataset = setup.checked_pairs(train_dataset, "the training data", args.bad_pairs)
            if eval_dataset is not None:
                eval_dataset = setup.checked_pairs(eval_dataset, "the evaluation data", args.bad_pairs)
        else:
            fresh_pairs.check_arguments(args, processing_class, data_collator)
            train_dataset = fresh_pairs.checked_rows(train_dataset, "train")
            eval_dataset = fresh_pairs.checked_rows(eval_dataset, "eval")
            args.remove_unused_columns = False  # a source may read any column
        self._distorted = int(args.povid_loss is not None)  # one more rejected reply per row
        self._extra = setup.extra_replies(train_dataset) + self._distorted
        self._pairs_without_change = 0
        super().__init__(
            model,
            ref_model=ref_model,
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
        distortion = DistortedReplies(shared=args.povid_loss == "shared") if self._distorted else None
        self._replies = ReplyLogProbs(self._dense_score(args), distortion)
        self._refuse_what_does_not_combine(args, own_collator=data_collator is not None)
        if self._is_vlm or args.freeze_vision_tower:
            prepare_model(self._base_model, args)
        self._shares = self._set_up_forwards(own_collator=data_collator is not None)
        make_collator = functools.partial(self._preference_collator, self.data_collator)
        self._fresh: FreshPairs | None = None
        if pair_source is not None:
            self._fresh, self.data_collator = FreshPairs(self, pair_source, make_collator), list
            self.train_dataset = rollout_rows(self.train_dataset, "train")
            self.eval_dataset = rollout_rows(self.eval_dataset, "eval")
        elif data_collator is None:
            self.data_collator = make_collator(self._extra - self._distorted)
        if args.reference_cache is not None:
            self._fill_reference_cache()
        if args.degeneration_steps is not None:
            self.add_callback(DegenerationWatch(self))

    @property
    def _base_model(self) -> nn.Module:
        """The model without PEFT's wrapper."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def _dense_score(self, args: DPOConfig) -> DenseScore | None:
        if args.dense_gamma is None:
            return None
        return DenseScore(
            args.dense_gamma, args.dense_reduction, per_token=bool(LENGTH_NORMALIZED & set(args.loss_type))
        )

    def _segment_options(self, args: DPOConfig) -> SegmentOptions | None:
        return None if args.dense_gamma is None else SegmentOptions(args.dense_min_match, args.dense_two_sided)

    def _preference_collator(self, collate: Any, extra: int) -> PreferenceCollator | DistortingCollator:
        """TRL's collator with what we add, for rows with so many further rejected replies."""
        args = self.args
        made = PreferenceCollator(
            copy.copy(collate),
            vision=self._is_vision_dataset,
            tokenizer=self._tokenizer,
            extra=extra + self._distorted,
            share=self._shares,
            segments=self._segment_options(args),
        )
        if not self._distorted:
            return made
        return DistortingCollator(made, self.processing_class, args.noise_steps, args.noise_overflow)

    def _refuse_what_does_not_combine(self, args: DPOConfig, own_collator: bool) -> None:
        needs_collator = {
            "Dense DPO": args.dense_gamma is not None,
            "`rejected_extra`": self._extra > self._distorted,
            "`reference_cache`": args.reference_cache is not None,
            "`povid_loss`": args.povid_loss is not None,
        }
        for name, is_needed in needs_collator.items():
            if is_needed and own_collator:
                raise ValueError(f"{name} needs the trainer's own collator. Leave out `data_collator`.")
        if self._extra and (
            args.precompute_ref_log_probs or self.aux_loss_enabled or self.compute_metrics is not None
        ):
            raise ValueError(
                "`rejected_extra` (and `povid_loss`, which adds one) does not go with `precompute_ref_log_probs` (use "
                "`reference_cache`), with the auxiliary loss of mixtures of experts, or with `compute_metrics`. Unset "
                "it, or drop the column."
            )
        if args.reference_cache is not None and isinstance(self.train_dataset, IterableDataset):
            raise ValueError("`reference_cache` needs a dataset with rows by index, not a stream. Unset it.")

    # Forwards

    def _set_up_forwards(self, own_collator: bool) -> bool:
        """Put our adapter around TRL's fused forwards; returns whether they share prefixes."""
        models = [self._base_model]
        if self.ref_model is not None:
            models.append(self.accelerator.unwrap_model(self.ref_model))
        reason = setup.why_no_shared_prefix(self, models, own_collator)
        if self.args.share_prefix and reason is not None and self._is_vlm and self.accelerator.is_main_process:
            logger.warning("Prompts are computed once per reply, not once per row: %s.", reason)
        for model in models:
            self._replies.attach(model)
            if reason is None:
                share_prefix(model)
        return reason is None

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = [
            "rejected_extra",
            "rejected_extra_ids",
            "prompt",
            "chosen",
            "rejected",
            "chosen_spans",
            "rejected_spans",
        ]
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if self._distorted:  # rows with images are not prepared here
            raise ValueError("`povid_loss` puts noise on images, and the rows have no column `images`. Unset it.")
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not self._extra:
            return prepared

        def prepare(one: Any) -> Any:
            return super(DPOTrainer, self)._prepare_dataset(one, processing_class, args, dataset_name)

        return setup.prepared_extras(dataset, prepared, prepare, self._extra, dataset_name)

    def prompt_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch that begins with the prompts of `rows`, whatever replies follow."""
        collate = self.data_collator if self._fresh is None else self._fresh.collated
        has_replies = [not self._is_vision_dataset or has_pair(row) for row in rows]
        return collate([row if has else without_replies(row) for row, has in zip(rows, has_replies, strict=True)])

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        if self._fresh is not None and isinstance(inputs, list):
            inputs, extra = self._fresh.batch(inputs)
            self._extra = extra + self._distorted
        return super()._prepare_inputs(inputs)

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        self._replies.calls.clear()
        inputs = dict(inputs)
        if inputs.pop(WEIGHTLESS, False):
            with self._metrics_as_they_are():
                result = self._compute_loss(model, inputs, return_outputs)
            return (0.0 * result[0], result[1]) if return_outputs else 0.0 * result
        reference, is_changed = inputs.pop(REFERENCE, None), inputs.get(CHANGED)
        if self._extra:
            result = self._averaged_loss(model, inputs, reference, return_outputs)
        else:
            if is_changed is not None:
                inputs[CHANGED] = is_changed[0]
            inputs |= {} if reference is None else self._reference_sums(inputs, reference, is_changed)
            result = super()._compute_loss(model, inputs, return_outputs)
        if reference is not None:
            self._replies.calls.append(reference)
        self._log_tokens(inputs["completion_mask"][:, 1:].bool(), is_changed)
        return result

    def _averaged_loss(
        self, model: Any, inputs: dict[str, Any], reference: Tensor | None, return_outputs: bool
    ) -> Any:
        """Mean of TRL's losses over the pairs (chosen, each rejected reply); every reply is computed once.

            w L(chosen, rejected) + (1 - w) / n * (sum over n extras of L(chosen, extra))

        Source: arXiv:2407.02477, equation 5, for n = 1.
        """
        if return_outputs:
            raise ValueError("`rejected_extra` has no logits to return. Evaluate with `prediction_loss_only=True`.")
        is_changed = inputs.get(CHANGED)
        arguments = {key: value for key, value in inputs.items() if key not in ("completion_mask", CHANGED)}
        arguments |= {"use_cache": False, "fused_lm_head": True}
        arguments["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        policy = model(**arguments)
        reference = self._reference_log_probs(arguments) if reference is None else reference
        rows, tokens = len(inputs["input_ids"]) // (self._extra + 2), self._total_train_tokens
        weights = [self.args.rejected_weight, *[(1 - self.args.rejected_weight) / self._extra] * self._extra]
        total = 0.0
        for pair, weight in enumerate(weights):
            place = torch.cat([torch.arange(rows), torch.arange(rows) + (pair + 1) * rows]).to(policy.log_probs.device)
            chosen_and_rejected = {key: inputs[key][place] for key in PAIR_KEYS}
            changed = None if is_changed is None else is_changed[pair : pair + 1]
            sums = self._reference_sums(chosen_and_rejected, reference[place], changed)
            computed = self._computed(policy, place, chosen_and_rejected, changed)
            with self._reference_in_batch():
                loss = super()._compute_loss(computed, {**chosen_and_rejected, **sums}, False)
            total = total + weight * loss
        self._count_tokens_once(tokens, inputs["attention_mask"])
        return total

    def _computed(self, output: Any, place: Tensor, pair: dict[str, Tensor], is_changed: Tensor | None) -> Any:
        """A forward that was computed before, for TRL to call: `output` at the rows `place`."""
        rows = type(output)(**{name: output[name][place] for name in PER_TOKEN if name in output})
        if is_changed is not None:
            is_reply = pair["completion_mask"][:, 1:].bool()
            rows.log_probs = self._replies.dense.apply(rows.log_probs, is_changed[0], is_reply)
        return lambda **_: rows

    def _reference_sums(
        self, pair: dict[str, Tensor], log_probs: Tensor, is_changed: Tensor | None
    ) -> dict[str, Tensor]:
        """The reference part of a TRL batch, from log-probabilities per token; TRL's own code sums them up."""
        log_probs = log_probs.to(self.accelerator.device)
        output = _trl.FusedCausalLMOutput(log_probs=log_probs)
        forward = self._computed(output, torch.arange(len(log_probs)), pair, is_changed)
        chosen, rejected = self.compute_ref_log_probs(forward, {key: pair[key] for key in PAIR_KEYS})
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _reference_log_probs(self, arguments: dict[str, Any]) -> Tensor:
        """(N, T - 1), from the reference model, or from the policy without its adapter, as TRL does."""
        adapter = contextlib.nullcontext()
        if self.ref_model is None:
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = _trl.use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        kwargs = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), _trl.disable_gradient_checkpointing(self.model, kwargs), adapter:
            return (self.ref_model or self.model)(**arguments).log_probs

    @contextlib.contextmanager
    def _reference_in_batch(self) -> Any:
        """Let TRL read the reference off the batch."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    @contextlib.contextmanager
    def _metrics_as_they_are(self) -> Any:
        """Leave out of the logs what a batch without weight would add."""
        mode = "train" if self.model.training else "eval"
        counts = self._total_train_tokens, self._pairs_without_change
        before = {name: list(values) for name, values in self._metrics[mode].items()}
        try:
            yield
        finally:
            self._total_train_tokens, self._pairs_without_change = counts
            self._metrics[mode].clear()
            self._metrics[mode].update(before)

    def _count_tokens_once(self, tokens_before: int, attention_mask: Tensor) -> None:
        """TRL counted the chosen reply once per pair."""
        if self.model.training:
            tokens = self.accelerator.gather_for_metrics(attention_mask.sum()).sum().item()
            self._total_train_tokens = tokens_before + tokens // self._tp_size
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _log_tokens(self, is_reply: Tensor, is_changed: Tensor | None) -> None:
        """Log what TRL's metrics of whole replies do not show."""
        policy, *references = self._replies.calls
        wants_drift = self.args.degeneration_steps is not None
        if (is_changed is None and not wants_drift) or not references:
            return
        width = is_reply.size(1)
        ratios = policy[:, -width:] - references[-1].to(policy.device)[:, -width:]
        metrics = self._metrics["train" if self.model.training else "eval"]
        gather = self.accelerator.gather
        if is_changed is not None:
            found = dpo_metrics.dense_metrics(ratios, is_changed, is_reply, gather)
            self._pairs_without_change += found.pop("dense/pairs_without_change")
            metrics["dense/pairs_without_change"] = [self._pairs_without_change]
            for name, value in found.items():
                metrics[name].append(value)
        if wants_drift:
            for name, value in dpo_metrics.drift_metrics(ratios, is_reply, self._extra, gather).items():
                metrics[name].append(value)

    # Reference on disk

    def _fill_reference_cache(self) -> None:
        self.data_collator.reference = filled_for(self, self._score_reference).of_row
        self.ref_model, self.precompute_ref_logps = None, True

    def _score_reference(self, reference: Any, batch: dict[str, Tensor]) -> Tensor:
        batch = self._prepare_inputs(batch)
        self._replies.calls.clear()
        batch.pop(CHANGED, None)  # the cache holds what no weighting has touched
        self.compute_ref_log_probs(reference, batch)
        return self._replies.calls.pop()[:, -(batch["input_ids"].size(1) - 1) :]
