"""Options of the image side of preference: the chosen reply under its image against the same under another one."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trl

from trl_vlm.pairs.crops import check_crop
from trl_vlm.pairs.noise import Overflow, check_noise
from trl_vlm.trainers.checks import refuse, refuse_negative
from trl_vlm.trainers.options import PartOptions

if TYPE_CHECKING:  # only for type checkers: as a real base its defaults would hide those of TRL's configuration

    class Base(PartOptions, trl.DPOConfig):
        """What `DPOConfig` holds beside."""

        noise_steps: int
        noise_overflow: Overflow
        reference_cache: str | None
        reference_free: bool
else:
    Base = object

CORRUPTIONS = ("mask", "noise", "crop", "other")

# mDPO, arXiv:2406.11839; CHiP, arXiv:2501.16629; OPA-DPO, arXiv:2501.09695. docs/methods/image_preference.md says what
# their code does otherwise. The corruption of a preset may be replaced, its other values belong together.
PRESETS: dict[str, dict[str, Any]] = {
    "mdpo": {"beta": 0.1, "image_weight": 1.0, "anchor_weight": 1.0, "image_corruption": "crop"},
    "chip": {
        "beta": 0.1,
        "image_weight": 1.0,
        "image_inside": True,
        "image_corruption": "noise",
        "dense_gamma": 4.0,
        "dense_reduction": "sum",
    },
    "opa": {
        "beta": 0.1,
        "image_weight": 0.2,
        "anchor_weight": 1.0,
        "image_corruption": "mask",
        "image_mask_ratio": 0.3,
    },
}
REPLACEABLE = ("image_corruption", "image_mask_ratio")
# Losses of the difference between the two scores of a pair alone: terms can be added to it.
DIFFERENCE_LOSSES = {"sigmoid", "hinge", "robust", "exo_pair", "discopop"}


@dataclass
class ImageOptions(Base):
    """The image side of preference: a mixin before TRL's `DPOConfig`."""

    image_preset: str | None = field(
        default=None,
        metadata={
            "help": "Image side of preference with the published weights of 'mdpo' (an image pair and an anchor, 1 "
            "each), 'chip' (the image pair inside one sigmoid, segments weighted 4, noise) or 'opa' (0.2, 30 percent "
            "of the image hidden, an anchor).",
            "choices": list(PRESETS),
        },
    )
    image_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the image pair: the chosen reply given the image against the same reply given a "
            "corrupted image, or `rejected_images` of the row. Unset, it is 0 or the preset's."
        },
    )
    image_corruption: str | None = field(
        default=None,
        metadata={
            "help": "How the image is corrupted where a row has no `rejected_images`: 'mask' hides image tokens from "
            "attention, 'noise' is POVID's (`noise_steps`), 'crop' a small random part, 'other' the image of another "
            "row.",
            "choices": list(CORRUPTIONS),
        },
    )
    image_mask_ratio: float | None = field(
        default=None,
        metadata={"help": "`image_corruption='mask'`: share of image tokens to hide. Unset, 1.0 or the preset's."},
    )
    image_crop_min_area: float = field(
        default=0.01, metadata={"help": "`image_corruption='crop'`: smallest share of the image's area."}
    )
    image_crop_max_area: float = field(
        default=0.2, metadata={"help": "`image_corruption='crop'`: largest share of the image's area."}
    )
    image_seed: int | None = field(
        default=None,
        metadata={
            "help": "Fixes each row's corruption, so that `reference_cache` can hold its numbers. Unset, it is new "
            "in every epoch."
        },
    )
    image_inside: bool = field(
        default=False,
        metadata={
            "help": "Add the image pair's difference to that of the two replies, inside one loss (CHiP), instead of "
            "adding a loss."
        },
    )
    image_metrics: bool = field(
        default=False,
        metadata={"help": "Log `image/*` at `image_weight` 0, too: how far replies depend on the image."},
    )
    anchor_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the anchor -log σ(beta D - `anchor_value`), D the log-ratio of the chosen reply to the "
            "reference: keeps it likely. Unset, it is 0 or the preset's."
        },
    )
    anchor_value: float = field(
        default=0.0, metadata={"help": "What beta D of the chosen reply is compared with in the anchor."}
    )

    @property
    def has_image_pair(self) -> bool:
        """Whether the chosen reply is computed under a second image."""
        return bool(self.image_weight) or self.image_metrics

    def fill_in_image_preset(self) -> None:
        """Sets what `image_preset` stands for; called before anything is checked.

        Raises:
            ValueError: It is unknown, or contradicts an option that is set.
        """
        if self.image_preset is not None and self.image_preset not in PRESETS:
            raise ValueError(f"`image_preset` is {self.image_preset!r}; it must be one of {', '.join(PRESETS)}.")
        for name, value in PRESETS.get(self.image_preset or "", {}).items():
            given = getattr(self, name)
            is_set = given is not None and given is not False
            if is_set and given != value and name not in REPLACEABLE:
                raise ValueError(
                    f"`{name}` is {given!r}, but the preset {self.image_preset!r} sets it to {value!r}. Leave one of "
                    "the two out, or set the options of docs/methods/image_preference.md without a preset."
                )
            setattr(self, name, given if is_set else value)

    def complete_from_trl(self) -> None:
        """As in `PartOptions`."""
        super().complete_from_trl()
        self.complete_image_options()

    def complete_image_options(self) -> None:
        """Gives unset numbers their defaults."""
        self.image_weight, self.anchor_weight = self.image_weight or 0.0, self.anchor_weight or 0.0
        self.image_mask_ratio = 1.0 if self.image_mask_ratio is None else self.image_mask_ratio

    def check_image_options(self) -> None:
        """Refuses values out of range, and options that contradict each other.

        Raises:
            ValueError: The message says which, why, and what to do.
        """
        weights = {"image_weight": self.image_weight, "anchor_weight": self.anchor_weight}
        refuse_negative(weights, "the term would reward what it is to prevent")
        for name, value in (weights | {"anchor_value": self.anchor_value}).items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"`{name}` is {value}; it must be a finite number.")
        self._check_corruption()
        if self.anchor_weight:
            stored = "TRL stores sums for its own losses alone. Use `reference_cache`"
            refuse(
                "`anchor_weight`",
                {
                    "`reference_free`": (self.reference_free, "the anchor reads the reference"),
                    "`precompute_ref_log_probs`": (self.precompute_ref_log_probs, stored),
                },
            )
        if self.has_image_pair:
            self._check_image_pair()
        elif self.image_inside:
            raise ValueError("`image_inside` adds the image pair to the loss, and `image_weight` is 0. Set it.")

    def _check_corruption(self) -> None:
        if self.image_corruption not in (None, *CORRUPTIONS):
            raise ValueError(
                f"`image_corruption` is {self.image_corruption!r}; it must be one of {', '.join(CORRUPTIONS)}."
            )
        if self.image_mask_ratio is not None and not 0 < self.image_mask_ratio <= 1:
            raise ValueError(
                f"`image_mask_ratio` is {self.image_mask_ratio}; it is a share of the image's tokens, above 0 and at "
                "most 1."
            )
        check_crop(self.image_crop_min_area, self.image_crop_max_area)
        if self.image_corruption == "noise":
            check_noise(self.noise_steps, "code", self.noise_overflow)

    def _check_image_pair(self) -> None:
        losses = set(self.loss_type)
        if self.image_weight and losses == {"sft"}:
            raise ValueError("`image_weight` weighs a preference loss, and `loss_type` is 'sft' alone. Add one to it.")
        refuse(
            "The image pair (`image_weight`, `image_metrics`)",
            {
                "`precompute_ref_log_probs`": (
                    self.precompute_ref_log_probs,
                    "TRL stores the two replies of a row alone. Use `reference_cache` with `image_seed`",
                )
            },
        )
        if self.reference_cache is not None and self.image_corruption is not None:
            self._check_cacheable()
        if not self.image_inside:
            return
        others = sorted(losses - DIFFERENCE_LOSSES - {"sft"})
        if others or self.f_divergence_type != "reverse_kl" or not self.image_weight:
            raise ValueError(
                "`image_inside` adds to the difference of two log-ratios, so it needs `image_weight` above 0, the "
                f"reverse KL and losses of that difference alone ({', '.join(sorted(DIFFERENCE_LOSSES))}); got "
                f"{self.image_weight}, {self.f_divergence_type!r} and {self.loss_type}."
            )

    def _check_cacheable(self) -> None:
        name = f"`image_corruption={self.image_corruption!r}`"
        reason = "the image depends on the other rows. Write it into a column `rejected_images`"
        refuse("`reference_cache`", {name: (self.image_corruption == "other", reason)})
        reason = "the image is another one in every epoch. Set `image_seed`, which fixes it"
        refuse("`reference_cache`", {name: (self.image_seed is None, reason)})
