"""Options of the reward trainer."""

from dataclasses import dataclass, field

import trl

from trl_vlm.data.images import MAX_IMAGE_PIXELS
from trl_vlm.trainers.checks import refuse_negative
from trl_vlm.trainers.options import PartOptions


@dataclass
class RewardConfig(PartOptions, trl.RewardConfig):
    """TRL's `RewardConfig` with what reward models of images and facts need.

    `judge_template` and `use_facts` control the text around a reply, `freeze_vision_tower` what is trained,
    `mean_reward_coefficient` what is added to the loss; `share_prefix` saves time and changes no number; the others
    guard against silent faults.
    """

    max_length: int | str | None = field(
        default="auto",
        metadata={
            "help": "Longest sequence in tokens, image tokens included. 'auto': no limit for rows with images, TRL's "
            "1024 for text. With images a longer row is an error (see `drop_too_long_rows`), never cut; with text "
            "alone it is filtered out, as in TRL."
        },
    )
    drop_too_long_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows with images that are longer than `max_length`, and log how many they were."},
    )
    max_image_pixels: int | None = field(
        default=MAX_IMAGE_PIXELS,
        metadata={"help": "Largest image that is decoded, width times height; a larger one is an error."},
    )
    check_image_tokens: bool = field(
        default=True,
        metadata={
            "help": "Refuse rows whose image placeholders are not as many as their images have features. False leaves "
            "that to the model, for a family that counts in a way that the check does not know."
        },
    )
    judge_template: str | None = field(
        default=None,
        metadata={
            "help": "Folder or JSON file of the judge template, or 'none' for the plain conversation. Default: the "
            "template saved with the model, else the one of this package."
        },
    )
    use_facts: bool = field(
        default=True,
        metadata={"help": "Show the column `facts` to the reward model, in the judge turn. False: leave it out."},
    )
    mean_reward_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Weight of |mean(chosen + rejected reward)| in the loss, which centers the rewards; Fact-RLHF: "
            "1e-3. `center_rewards_coefficient` weights the mean of the square instead."
        },
    )
    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Compute prompt and images once per pair instead of once per reply, in batches where that is "
            "faster, and in models where it gives the same numbers."
        },
    )
    check_pixels: bool = field(
        default=True,
        metadata={"help": "Before the first step with images, check that scores depend on the pixels; else stop."},
    )

    def __post_init__(self) -> None:
        """Refuses contradictions."""
        super().__post_init__()
        if isinstance(self.max_length, str) and self.max_length != "auto":
            # The command line passes text.
            self.max_length = None if self.max_length.lower() in ("none", "null") else int(self.max_length)
        if self.drop_too_long_rows and not isinstance(self.max_length, int):
            raise ValueError(
                f"`drop_too_long_rows` needs a `max_length`, which is {self.max_length!r}. Set it, or drop nothing."
            )
        refuse_negative(
            {"mean_reward_coefficient": self.mean_reward_coefficient},
            "it would drive the rewards away from zero (Fact-RLHF: 1e-3)",
        )
