"""Preparation that only `DPOTrainer` needs: its reference and its shared prefixes."""

from collections.abc import Callable
from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from trl_vlm.data.faults import SCORE_WEIGHT_COLUMNS
from trl_vlm.data.named_rows import has_images
from trl_vlm.data.rows import REJECTED_IMAGES
from trl_vlm.models.prefix_sharing.sharing import why_not_shareable
from trl_vlm.pairs.draws import Draws
from trl_vlm.trainers import preparation
from trl_vlm.trainers.checks import refuse, refuse_pathless_reference
from trl_vlm.trainers.dpo.collator import PreferenceCollator
from trl_vlm.trainers.dpo.config import LENGTH_NORMALIZED, DPOConfig
from trl_vlm.trainers.dpo.distortion import DistortingCollator
from trl_vlm.trainers.dpo.image_collator import Corruption, ImagePairCollator
from trl_vlm.trainers.dpo.log_probs import DenseScore
from trl_vlm.trainers.dpo.segments import SegmentOptions
from trl_vlm.trainers.types import Model, NumberedRows, Rows, base_model

PairsCollator = PreferenceCollator | DistortingCollator | ImagePairCollator


class DPOSetup(Protocol):
    """The attributes of a constructed trainer that decide on shared prefixes."""

    args: DPOConfig
    accelerator: Accelerator
    model: Model
    train_dataset: Rows | NumberedRows | None
    compute_metrics: Callable[..., dict] | None
    aux_loss_enabled: bool


def why_no_shared_prefix(trainer: DPOSetup, models: list[PreTrainedModel], own_collator: bool) -> str | None:
    """Why a `DPOTrainer` computes prompts once per reply, as one sentence; None if its models can share them."""
    args = trainer.args
    further = {
        "`compute_metrics` reads logits of whole sequences": trainer.compute_metrics is not None,
        "the auxiliary loss of mixtures of experts counts every token": trainer.aux_loss_enabled,
        "`keep_end` truncation gives the replies of a row different prompts": (
            args.truncation_mode == "keep_end" and args.max_length is not None
        ),
    }
    reason = preparation.why_no_shared_prefix(trainer.model, args, own_collator, further)
    return reason or next(filter(None, (why_not_shareable(model.config) for model in models)), None)


def refuse_unknown_reference(
    model: str | Model, ref_model: PreTrainedModel | None, peft_config: PeftConfig | None, args: DPOConfig
) -> None:
    """Stops where TRL would load the reference from the path of a model that was made in memory and has none.

    Raises:
        ValueError: The model has no path, and its reference is neither passed, nor its own base, nor precomputed.
    """
    if ref_model is None and not args.precompute_ref_log_probs:
        refuse_pathless_reference(model, peft_config, "Pass `ref_model=copy.deepcopy(model)`")


def refuse_what_does_not_combine(
    trainer: DPOSetup, num_extra_rejected: int, has_own_collator: bool, has_pair_loss: bool
) -> None:
    """Refuses combinations of options in which one would have no effect.

    Raises:
        ValueError: The message says which, why, and what to do.
    """
    args = trainer.args
    needs_collator = {
        "Dense DPO": args.dense_gamma is not None,
        "`rejected_extra`": num_extra_rejected > 0,
        "`reference_cache`": args.reference_cache is not None,
        "`povid_loss`": args.povid_loss is not None,
        "`image_weight` (and `image_metrics`)": args.has_image_pair,
    }
    for name, is_needed in needs_collator.items():
        if is_needed and has_own_collator:
            raise ValueError(f"{name} needs the trainer's own collator. Leave out `data_collator`.")
    if num_extra_rejected > 0 or args.povid_loss is not None:
        one_pair = "it is made for one pair per row"
        refuse(
            "`rejected_extra` (and `povid_loss`, which adds one)",
            {
                "`precompute_ref_log_probs`": (args.precompute_ref_log_probs, f"{one_pair} (see `reference_cache`)"),
                "The auxiliary loss of mixtures of experts": (trainer.aux_loss_enabled, one_pair),
                "`compute_metrics`": (trainer.compute_metrics is not None, one_pair),
            },
        )
    if has_pair_loss:
        reason = "TRL adds it to its own losses (see `router_aux_loss_coef`)"
        refuse("`pair_loss`", {"The auxiliary loss of mixtures of experts": (trainer.aux_loss_enabled, reason)})
    _refuse_for_image_pair(trainer, has_pair_loss)
    if args.reference_cache is not None and isinstance(trainer.train_dataset, IterableDataset):
        raise ValueError("`reference_cache` needs a dataset with rows by index, not a stream. Unset it.")


def _refuse_for_image_pair(trainer: DPOSetup, has_pair_loss: bool) -> None:
    """The part of `refuse_what_does_not_combine` for the image side of preference."""
    args, model = trainer.args, trainer.model
    if args.has_image_pair or args.anchor_weight:
        mixture = (trainer.aux_loss_enabled, "it is made for one pair per row")
        names = "`image_weight`, `image_metrics` and `anchor_weight`"
        refuse(names, {"The auxiliary loss of mixtures of experts": mixture})
    if args.image_inside:
        refuse("`image_inside`", {"`pair_loss`": (has_pair_loss, "the function can add the terms itself")})
    checkpointing = args.gradient_checkpointing_kwargs
    is_reentrant = isinstance(checkpointing, dict) and bool(checkpointing.get("use_reentrant"))
    if args.image_weight and is_reentrant and trainer.accelerator.distributed_type != DistributedType.NO:
        raise ValueError(
            "`image_weight` runs the model twice before the gradient is taken, and with reentrant gradient "
            "checkpointing each of the two would send its own gradient to the other processes. (TRL takes this kind "
            "for adapters under ZeRO-3.) Set `gradient_checkpointing=False`, or use DDP, ZeRO-2 or FSDP2."
        )
    if args.has_image_pair and args.image_corruption == "mask":
        virtual = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        reason = "it numbers the tokens behind them itself"
        refuse("`image_corruption='mask'`", {"An adapter with virtual tokens": (virtual, reason)})


def dense_score(args: DPOConfig, has_pair_loss: bool) -> DenseScore | None:
    """How Dense DPO scores replies; None without it."""
    if args.dense_gamma is None:
        return None
    assert args.dense_reduction is not None  # Dense DPO is refused without
    per_token = not has_pair_loss and bool(LENGTH_NORMALIZED & set(args.loss_type))
    return DenseScore(args.dense_gamma, args.dense_reduction, per_token=per_token)


def segment_options(args: DPOConfig) -> SegmentOptions | None:
    """How Dense DPO finds changed tokens; None without it."""
    return None if args.dense_gamma is None else SegmentOptions(args.dense_min_match, args.dense_two_sided)


def refuse_unread_columns(dataset: Rows | None, args: DPOConfig) -> None:
    """Refuses columns of weights that nothing would read, and an image pair without images.

    Raises:
        ValueError: The message says which, and what to do.
    """
    if dataset is None or dataset.column_names is None:  # a stream may not know them
        return
    columns = dataset.column_names
    weights = sorted(set(SCORE_WEIGHT_COLUMNS) & set(columns))
    if weights and args.dense_gamma is None:
        raise ValueError(
            f"The dataset has the column {', '.join(weights)}, which only Dense DPO reads. Set `dense_gamma=1.0` and "
            "`dense_reduction='sum'` to weight DPO's own scores, or drop the column."
        )
    if args.has_image_pair and not has_images(dataset):
        raise ValueError("`image_weight` compares two images, and the rows have no column `images`. Unset it.")
    if args.has_image_pair and args.image_corruption is None and REJECTED_IMAGES not in columns:
        raise ValueError(
            "`image_weight` (or `image_metrics`) needs a second image for each row: set `image_corruption`, or give "
            f"the dataset a column `{REJECTED_IMAGES}`."
        )


def with_image_pair(
    trainer: DPOSetup,
    collate: PreferenceCollator | DistortingCollator,
    pairs: PreferenceCollator,
    draws: Callable[[str], Draws],
) -> ImagePairCollator:
    """The collator, with the chosen replies under corrupted images.

    Raises:
        ValueError: The images of other rows are asked for, and the rows are a stream.
    """
    args, others = trainer.args, trainer.train_dataset
    if args.image_corruption == "other" and (others is None or isinstance(others, IterableDataset)):
        raise ValueError(
            "`image_corruption='other'` takes images of other training rows by their index, which a stream (or no "
            "training data) does not have. Take another corruption, or a column `rejected_images`."
        )
    assert not isinstance(others, IterableDataset)
    corruption = Corruption(
        args.image_corruption,
        mask_ratio=1.0 if args.image_mask_ratio is None else args.image_mask_ratio,
        noise_steps=args.noise_steps,
        noise_overflow=args.noise_overflow,
        crop_areas=(args.image_crop_min_area, args.image_crop_max_area),
        seed=args.image_seed,
    )
    others = others if args.image_corruption == "other" else None
    return ImagePairCollator(collate, pairs, corruption, draws, base_model(trainer.model).config, others)
