"""Options that the configurations of all trainers share."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl_vlm.trainers.checks import refuse_negative

if TYPE_CHECKING:  # only for type checkers: as a real base its defaults would hide those of TRL's configuration
    from transformers import TrainingArguments
else:
    TrainingArguments = object


@dataclass
class PartOptions(TrainingArguments):
    """Which parts of a vision-language model train, how fast, and on what: a mixin before TRL's configuration."""

    freeze_vision_tower: bool = field(
        default=False,
        metadata={"help": "Do not train the vision tower, nor adapters inside it. The projector stays trainable."},
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the projector between vision tower and language model, if it differs."},
    )
    append_eos: bool = field(
        default=True,
        metadata={
            "help": "Where the chat template does not end a reply (LLaVA-1.5), append the end token to it in what is "
            "trained on and in the saved processor, so that the model learns to stop."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_parts()

    def check_parts(self) -> None:
        """Refuses learning rates below zero.

        Raises:
            ValueError: `projector_learning_rate` is negative.
        """
        refuse_negative(
            {"projector_learning_rate": self.projector_learning_rate}, "the optimizer would climb the loss"
        )

    def complete_from_trl(self) -> None:
        """Called on a configuration made of TRL's: our options have their defaults, and TRL's are resolved."""


@dataclass
class ImageFeatureOptions(PartOptions):
    """How many features of images are kept, and where: a mixin before TRL's configuration."""

    image_feature_cache: float = field(
        default=1.0,
        metadata={
            "help": "Where vision tower and projector are frozen and have no adapter, each process keeps up to this "
            "many GiB of image features for the length of a rollout (DPO: of a batch), so that an image is encoded "
            "once for all models and passes. 0: encode it in each pass."
        },
    )
    image_features_on_cpu: bool = field(
        default=False,
        metadata={"help": "Keep these features in the memory of the CPU, not of the device; hits are then copied."},
    )

    def check_parts(self) -> None:
        """Also refuses a negative number of GiB."""
        super().check_parts()
        refuse_negative({"image_feature_cache": self.image_feature_cache}, "it is a size; 0 keeps nothing")


@dataclass
class SharedBaseOptions(ImageFeatureOptions):
    """Whether the models of a run stand on one base: a mixin before TRL's configuration."""

    share_base: bool | None = field(
        default=None,
        metadata={
            "help": "With LoRA, let further models of the run be adapters and heads on the policy's frozen base: "
            "reward models that are adapters of the same base, and PPO's critic. None: where it is possible. True: "
            "stop where it is not. False: a model each."
        },
    )


@dataclass
class GroupOptions(SharedBaseOptions):
    """Whether the replies of a group share their prompt: a mixin before TRL's configuration."""

    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Compute prompt and images once for the replies to a prompt that a micro-batch holds, instead of "
            "once per reply, where that is tested to give the same numbers; micro-batches then hold whole groups."
        },
    )
