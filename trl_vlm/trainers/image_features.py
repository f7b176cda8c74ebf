"""Which models of a run take the features of their images from one store, and for how long these are kept."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_vlm.models.feature_cache import cache_image_features, encodes_images, stop_caching, why_not_cached
from trl_vlm.models.feature_store import FeatureStore, SplitTowers
from trl_vlm.rewards.reward_model import reward_models_in
from trl_vlm.trainers.checks import refuse_images_on_some_processes
from trl_vlm.trainers.types import base_model, gathered, unwrapped

logger = logging.getLogger(__name__)


class FeatureArguments(Protocol):
    """The options that decide on the store."""

    image_feature_cache: float
    image_features_on_cpu: bool
    torch_compile: bool


class FeatureRun(Protocol):
    """What is asked of a trainer whose models encode an image once."""

    accelerator: Accelerator

    @property
    def args(self) -> FeatureArguments: ...  # noqa: D102


def features_of_run(
    trainer: FeatureRun, trained: Mapping[str, nn.Module | None], scoring: Iterable[nn.Module] = ()
) -> FeatureStore:
    """The store from which the models of a run take the features of images that one of them has encoded.

    Where a model encodes its images each time, the log says why.

    Args:
        trainer: After TRL's constructor, and after all adapters of its models.
        trained: Policy, reference and critic, by name, which the backend may split among the processes.
        scoring: Reward models, which each process holds whole.
    """
    store = FeatureStore(trainer.args.image_feature_cache * 2**30, trainer.args.image_features_on_cpu)
    everywhere = _why_never(trainer.args)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    is_split = is_deepspeed_zero3_enabled() or plugin is not None
    unsplittable = "it is not tested under FSDP1; set `fsdp_version: 2`" if _is_fsdp1(plugin) else None
    # A reward model of its own scores in its own precision.
    of_run = {"precision": trainer.accelerator.autocast, "is_split": is_split}
    models = [(name, model, everywhere or unsplittable, of_run) for name, model in trained.items()]
    models += [("reward model", model, everywhere, {}) for model in scoring]
    for name, wrapped, reason, options in models:
        model = None if wrapped is None else unwrapped(trainer.accelerator, wrapped)
        if not isinstance(model, PreTrainedModel | PeftModel) or not encodes_images(base_model(model)):
            continue
        model = base_model(model)
        reason = reason or why_not_cached(model)
        if reason is None:
            cache_image_features(model, store, **options)
        else:
            stop_caching(model)
        if trainer.accelerator.is_main_process:
            told = "once for all passes that read them" if reason is None else f"in each pass: {reason}"
            logger.info("The %s encodes its images %s.", name, told)
    return store


def _why_never(args: FeatureArguments) -> str | None:
    if args.image_feature_cache == 0:
        return "`image_feature_cache` is 0"
    return "`torch_compile` is not tested with kept features" if args.torch_compile else None


def _is_fsdp1(plugin: FullyShardedDataParallelPlugin | None) -> bool:
    return plugin is not None and plugin.fsdp_version != 2


class FeaturesPerBatch(Trainer):
    """Encodes an image once for all that is computed of a batch: a mixin before TRL's trainer."""

    accelerator: Accelerator
    _image_features: FeatureStore | None = None

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        if self._image_features is not None:
            self._image_features.clear()
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in TRL; all processes read the images of their batches together.

        Raises:
            RuntimeError: Weights are split among the processes, and the batches of some of them have no image.
        """
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            has_images = torch.tensor([float("pixel_values" in inputs)], device=self.accelerator.device)
            refuse_images_on_some_processes(gathered(self.accelerator, has_images))
        with _together(self._image_features):
            return super().compute_loss(model, inputs, *args, **kwargs)


class FeaturesPerRollout(Trainer):
    """Encodes an image once for generation, scores and every pass through a rollout: a mixin before TRL's trainer."""

    accelerator: Accelerator
    args: Any
    model: Any
    ref_model: Any
    reward_funcs: list[Any]
    _image_features: FeatureStore | None = None

    def keep_image_features(self, **further: nn.Module) -> None:
        """Gives the models of the run one store; call it at the end of the constructor.

        Args:
            further: Models that train beside the policy.
        """
        scoring = [reward.model for function in self.reward_funcs for reward in reward_models_in(function)]
        trained = {"policy": self.model, "reference": self.ref_model, **further}
        self._image_features = features_of_run(self, trained, [m for m in scoring if isinstance(m, nn.Module)])

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._image_features is not None:
            self._image_features.clear()
        trainer: Any = super()  # one of TRL's, which have no base for rollouts in common
        return trainer._generate_and_score_completions(inputs)

    # What all processes do together

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As in TRL; all processes read the images of their micro-batches together."""
        with _together(self._image_features):
            return super().compute_loss(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        with _together(self._image_features):
            return trainer._get_per_token_logps_and_entropies(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        with _together(self._image_features):  # reward models on the policy's base
            return trainer._calculate_rewards(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        is_gathered = is_deepspeed_zero3_enabled() and self.args.ds3_gather_for_generation
        with _together(self._image_features, "gathered" if is_gathered else "agree"):
            return trainer._generate_single_turn(*args, **kwargs)


def _together(store: FeatureStore | None, how: SplitTowers = "agree") -> AbstractContextManager[None]:
    """A context in which features are read where processes hold parts of a tower too."""
    return nullcontext() if store is None else store.used_in_split_towers(how)
