"""Options of `DPOTrainer` that TRL does not have. All are off unless set, except prefix sharing."""

import math
from dataclasses import dataclass, field

import trl

from trl_vlm.pairs.noise import Overflow, check_noise
from trl_vlm.pairs.source import PAIR_BATCH_SIZE
from trl_vlm.pairs.vllm import VLLMOptions
from trl_vlm.trainers.checks import refuse
from trl_vlm.trainers.dpo.image_options import ImageOptions
from trl_vlm.trainers.options import ImageFeatureOptions


@dataclass(frozen=True)
class _Preset:
    gamma: float
    beta: float
    reduction: str


# RLHF-V as printed (section 4.1, appendix C) and as released (Muffin, `run_RLHFV.sh`). The three values belong
# together: a sum is some hundred times a mean, so beta and gamma of one are meaningless with the other.
PRESETS = {
    "paper": _Preset(gamma=5.0, beta=0.5, reduction="mean"),
    "release": _Preset(gamma=1.1, beta=0.1, reduction="sum"),
}
TRL_BETA = trl.DPOConfig.__dataclass_fields__["beta"].default

# TRL divides these by the number of reply tokens, and the others by nothing.
LENGTH_NORMALIZED = {"ipo", "sigmoid_norm"}


@dataclass
class DPOConfig(ImageOptions, ImageFeatureOptions, VLLMOptions, trl.DPOConfig):
    """TRL's `DPOConfig`, and options for images, Dense DPO, several rejected replies and the image side of preference.

    Dense DPO is on with `dense_preset`, or with `dense_gamma` and `dense_reduction`. Its reference is RLHF-V,
    arXiv:2312.00849; docs/methods/dpo.md says what each option does and where it differs from the paper.
    """

    # Unset, it is the preset's, or TRL's default: so a preset can see that it is overridden.
    beta: float | None = field(
        default=None,
        metadata={"help": f"As in TRL. Unset, it is {TRL_BETA}, or the value of a preset."},
    )

    # Dense DPO
    dense_preset: str | None = field(
        default=None,
        metadata={
            "help": "Dense DPO with the values of the RLHF-V 'paper' (gamma 5, beta 0.5, weighted mean) or of its "
            "'release' (gamma 1.1, beta 0.1, weighted sum). They do not mix.",
            "choices": list(PRESETS),
        },
    )
    dense_gamma: float | None = field(
        default=None,
        metadata={
            "help": "Dense DPO: weight of tokens in corrected segments (gamma >= 1); other tokens have weight 1."
        },
    )
    dense_reduction: str | None = field(
        default=None,
        metadata={
            "help": "Dense DPO: a reply's score is the weighted 'mean' or 'sum' of its log-probabilities.",
            "choices": ["mean", "sum"],
        },
    )
    dense_min_match: int = field(
        default=3,
        metadata={"help": "Dense DPO: how many tokens in a row must agree to separate two changed segments."},
    )
    dense_two_sided: bool = field(
        default=False,
        metadata={
            "help": "Dense DPO: count a change only where both replies have tokens, as the published code does; pure "
            "insertions and deletions then weigh 1."
        },
    )

    # Distorted images
    povid_loss: str | None = field(
        default=None,
        metadata={
            "help": "POVID: a further rejected reply per row, the model's greedy tokens given a noised image and the "
            "chosen reply before each token. 'published': policy and reference each score their own tokens; "
            "'shared': both score the policy's.",
            "choices": ["published", "shared"],
        },
    )
    noise_steps: int = field(
        default=500,
        metadata={"help": "`povid_loss`, `image_corruption='noise'`: how many steps of noise, from 0 to 999."},
    )
    noise_overflow: Overflow = field(
        default="wrap",
        metadata={
            "help": "The same: colors that leave their range 'wrap' around, as in the published code, or 'clip'.",
            "choices": ["wrap", "clip"],
        },
    )

    # Several rejected replies
    rejected_weight: float = field(
        default=0.5,
        metadata={
            "help": "With a `rejected_extra` column or `povid_loss`: weight of the pair with `rejected`; the pairs "
            "with the extra replies have the rest in equal parts. From 0 to 1."
        },
    )

    # A loss of one's own
    reference_free: bool = field(
        default=False,
        metadata={"help": "The trainer's `pair_loss` reads no reference: none is loaded, copied or computed."},
    )

    # Speed and memory
    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Compute prompt and image once per row instead of once per reply, in batches where that is "
            "faster, and in models where it gives the same numbers."
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the reference log-probabilities, computed once before training, also for image data; "
            "no reference model stays in memory. A folder made for other data or another model is refused."
        },
    )

    # Pairs that the policy makes
    pair_batch_size: int = field(
        default=PAIR_BATCH_SIZE,
        metadata={
            "help": "Rows that `pair_source` gets at once, of the rows of an optimizer step on one process. Pairs do "
            "not depend on it, but for rounding."
        },
    )

    # Data and degeneration
    bad_pairs: str = field(
        default="error",
        metadata={
            "help": "Rows with an empty reply are an 'error', or 'skip' leaves them out, with rows whose replies are "
            "identical, and reports how many.",
            "choices": ["error", "skip"],
        },
    )
    check_image_tokens: bool = field(
        default=True,
        metadata={
            "help": "Refuse rows whose image placeholders are not as many as their images have features. False leaves "
            "that to the model, for a family that counts in a way that the check does not know."
        },
    )
    degeneration_steps: int | None = field(
        default=None,
        metadata={
            "help": "Every this many steps, generate replies to a few training prompts and log how their length and "
            "repeats drift from those before training; logs the drift of log-probabilities too."
        },
    )
    degeneration_prompts: int = field(
        default=8, metadata={"help": "How many prompts `degeneration_steps` generates replies to."}
    )
    degeneration_max_new_tokens: int = field(
        default=128, metadata={"help": "Length limit of the replies of `degeneration_steps`."}
    )
    log_pairs_steps: int | None = field(
        default=None,
        metadata={
            "help": "With `pair_source`: every this many steps, write the pairs of the step with their images to the "
            "trackers of `report_to` (W&B, Trackio, TensorBoard), and without to `pairs/` in the output folder."
        },
    )

    def __post_init__(self):
        self.fill_in_image_preset()
        self._fill_in_preset()
        super().__post_init__()
        self.complete_image_options()
        self._check_ranges()
        self.check_image_options()
        if self.dense_gamma is not None:
            self._check_dense(self.dense_gamma)
        if self.reference_cache is not None:
            self._check_reference_cache()
        if self.reference_free:
            self._check_reference_free()
        if self.povid_loss is not None:
            self._check_povid_loss()

    def _fill_in_preset(self) -> None:
        if self.dense_preset is None:
            self.beta = TRL_BETA if self.beta is None else self.beta
            return
        if self.dense_preset not in PRESETS:
            raise ValueError(f"`dense_preset` is {self.dense_preset!r}; it must be one of {', '.join(PRESETS)}.")
        preset = PRESETS[self.dense_preset]
        values = {"dense_gamma": preset.gamma, "beta": preset.beta, "dense_reduction": preset.reduction}
        for name, value in values.items():
            given = getattr(self, name)
            if given is not None and given != value:
                raise ValueError(
                    f"`{name}` is {given!r}, but the preset {self.dense_preset!r} sets it to {value!r}. The presets "
                    "do not mix: leave one of the two out, or set `dense_gamma`, `dense_reduction` and `beta` without "
                    "a preset."
                )
            setattr(self, name, value)

    def _check_ranges(self) -> None:
        if (self.dense_gamma is None) != (self.dense_reduction is None):
            raise ValueError(
                f"Dense DPO needs `dense_gamma` (got {self.dense_gamma}) and `dense_reduction` (got "
                f"{self.dense_reduction!r}) together: gamma and beta mean different things for a sum and a mean. Set "
                "both, or use `dense_preset='paper'`."
            )
        if self.dense_min_match < 1:
            raise ValueError(f"`dense_min_match` is {self.dense_min_match}; it must be at least 1.")
        if not 0.0 <= self.rejected_weight <= 1.0:
            raise ValueError(f"`rejected_weight` is {self.rejected_weight}; it must lie between 0 and 1.")
        if self.degeneration_steps is not None and self.degeneration_steps < 1:
            raise ValueError(f"`degeneration_steps` is {self.degeneration_steps}; set 1 or more, or leave it out.")
        if self.pair_batch_size < 1:
            raise ValueError(f"`pair_batch_size` is {self.pair_batch_size}; a source gets 1 row or more at once.")
        if self.log_pairs_steps is not None and self.log_pairs_steps < 1:
            raise ValueError(f"`log_pairs_steps` is {self.log_pairs_steps}; set 1 or more, or leave it out.")
        if self.bad_pairs not in ("error", "skip"):
            raise ValueError(f"`bad_pairs` is {self.bad_pairs!r}; it must be 'error' or 'skip'.")

    def _check_dense(self, gamma: float) -> None:
        if not 1.0 <= gamma < math.inf:
            raise ValueError(
                f"`dense_gamma` is {gamma}; it must be a number from 1.0 on, or corrected tokens would count less "
                "than unchanged ones. Use 1.0 to weigh all tokens alike, or more to stress corrections."
            )
        if self.dense_reduction not in ("mean", "sum"):
            raise ValueError(f"`dense_reduction` is {self.dense_reduction!r}; it must be 'mean' or 'sum'.")
        self._check_dense_losses(set(self.loss_type) - {"sft"})
        divergence = (
            "it is a function of the ratio of two probabilities of the whole reply, which a weighted score is not"
        )
        stored = "TRL would store unweighted sums; `reference_cache` stores what Dense DPO needs"
        weights = "it weighs tokens too, by their place beyond the shorter reply"
        refuse(
            "Dense DPO",
            {
                "`ld_alpha`": (self.ld_alpha is not None, weights),
                "`f_divergence_type`": (self.f_divergence_type != "reverse_kl", divergence),
                "`precompute_ref_log_probs`": (self.precompute_ref_log_probs, stored),
            },
        )

    def _check_dense_losses(self, losses: set[str]) -> None:
        normalized = losses & LENGTH_NORMALIZED
        if normalized and self.dense_reduction == "sum":
            raise ValueError(
                f"The loss {', '.join(sorted(normalized))} divides by the number of reply tokens, and a sum weighted "
                "with gamma, divided by an unweighted count, is no mean. Use `dense_reduction='mean'`."
            )
        if normalized and losses - normalized:
            raise ValueError(
                f"With Dense DPO the loss {', '.join(sorted(normalized))} cannot be combined with "
                f"{', '.join(sorted(losses - normalized))}: the first reads a mean per token and the second a score "
                "of the whole reply, from the same log-probabilities. Train with one kind; 'sft' can be added to both."
            )

    def _check_povid_loss(self) -> None:
        if self.povid_loss not in ("published", "shared"):
            raise ValueError(f"`povid_loss` is {self.povid_loss!r}; it must be 'published' or 'shared'.")
        check_noise(self.noise_steps, "code", self.noise_overflow)
        unknown = "the rejected tokens are not known when changes are found"
        new_noise = "the noise is new in every epoch, so the reference cannot be computed before"
        refuse(
            "`povid_loss`",
            {
                "Dense DPO": (self.dense_gamma is not None, unknown),
                "`reference_cache`": (self.reference_cache is not None, new_noise),
            },
        )

    def _check_reference_free(self) -> None:
        names = ("reference_cache", "precompute_ref_log_probs", "sync_ref_model")
        refuse(
            "`reference_free`", {f"`{name}`": (bool(getattr(self, name)), "there is no reference") for name in names}
        )

    def _check_reference_cache(self) -> None:
        if not str(self.reference_cache).strip():
            raise ValueError("`reference_cache` is empty. Name a folder for it, or leave it out.")
        names = ("precompute_ref_log_probs", "sync_ref_model")
        reason = "it holds the log-probabilities of one fixed reference"
        refuse("`reference_cache`", {f"`{name}`": (bool(getattr(self, name)), reason) for name in names})
