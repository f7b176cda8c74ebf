"""What all trainers do around TRL's constructor: arguments, processor, parts, rates, card."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    PreTrainedConfig,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from trl_vlm.data.rows import ROW_NAME
from trl_vlm.models._transformers import hub_arguments, keep_4bit_layers_trainable, keep_parameter_names
from trl_vlm.models.checkpoints import last_complete_checkpoint
from trl_vlm.models.loading import base_of
from trl_vlm.models.parts import freeze_vision_tower, part_of, trainable_parameter_table
from trl_vlm.models.processors import as_trainable, load_processor
from trl_vlm.models.reply_ends import with_reply_ends
from trl_vlm.trainers.card import CardFacts, write_card
from trl_vlm.trainers.fsdp import loading_what_was_saved, reduce_gradient_of_head
from trl_vlm.trainers.options import PartOptions
from trl_vlm.trainers.types import Model, NumberedRows, Processor, Rows, base_model

logger = logging.getLogger(__name__)


class Arguments(Protocol):
    """The options of a trainer's configuration that preparation reads: TRL's and `PartOptions`."""

    model_init_kwargs: dict[str, Any] | str | None
    trust_remote_code: bool
    freeze_vision_tower: bool
    append_eos: bool


class SharingArguments(Protocol):
    """The options that decide whether replies can share their prompt."""

    share_prefix: bool
    torch_compile: bool


Config = TypeVar("Config", bound=PartOptions)


# Arguments


def complete_arguments(args: TrainingArguments | None, model: str | Model, config: type[Config]) -> Config:
    """The arguments as an instance of `config`, our configuration.

    TRL's own configuration becomes one of ours with all its values, including those that its `__post_init__` resolved,
    and the defaults of our options. None becomes a configuration with the name that TRL would choose.

    Raises:
        TypeError: The arguments are those of another trainer.
    """
    if isinstance(args, config):
        return args
    method = config.__name__.removesuffix("Config")
    if args is None:
        return config(f"{_short_name(model)}-{method}")
    theirs = next(base for base in config.__mro__ if base.__module__.partition(".")[0] == "trl")
    if not isinstance(args, theirs):
        raise TypeError(
            f"`args` is a {type(args).__module__}.{type(args).__name__}. Use `trl_vlm.{config.__name__}`, which takes "
            f"every argument of `trl.{theirs.__name__}`; that one is accepted too."
        )
    return _from_trl(args, config)


def _from_trl(args: TrainingArguments, config: type[Config]) -> Config:
    """A new instance with the state of `args`: `__post_init__` has run, and would refuse its own results."""
    ours = config.__new__(config)
    for option in dataclasses.fields(config):
        if option.default is not dataclasses.MISSING:
            setattr(ours, option.name, option.default)
        elif option.default_factory is not dataclasses.MISSING:
            setattr(ours, option.name, option.default_factory())
    vars(ours).update(vars(args))
    ours.complete_from_trl()
    return ours


def _short_name(model: str | Model) -> str:
    """The last part of the path that a model came from, or its class where it was made in memory."""
    path = model if isinstance(model, str) else model.config._name_or_path
    return os.path.basename(os.path.normpath(path)) if path else type(model).__name__


# Processor


def source_of(model: str | Model) -> str:
    """The origin of a model, and so of its processor.

    Raises:
        ValueError: The model was made in memory.
    """
    path = model if isinstance(model, str) else model.config._name_or_path
    if not path:
        raise ValueError(
            f"The model is a {type(model).__name__} that was made in memory, so its processor is unknown. Pass it as "
            "`processing_class`."
        )
    return path


def loading_arguments(model: str | Model, args: Arguments) -> dict[str, Any]:
    """The arguments for loading all parts of a checkpoint, so that weights, processor and template have one origin.

    For a model that is loaded already, `model_init_kwargs` is ignored, as in TRL.
    """
    given = model_options(args)
    hub = hub_arguments(given) if isinstance(model, str) else {}
    return {"trust_remote_code": given.get("trust_remote_code", args.trust_remote_code), **hub}


def model_options(args: Arguments) -> dict[str, Any]:
    """A copy of `model_init_kwargs`; the arguments have parsed text from a command line."""
    given = args.model_init_kwargs
    assert not isinstance(given, str)
    return dict(given or {})


def loading_arguments_of_others(args: Arguments) -> dict[str, Any]:
    """The loading options of models beside the policy: the policy's, without its revision."""
    given = model_options(args)
    for name in ("revision", "subfolder", "device_map"):
        given.pop(name, None)
    return given


def config_of(model: str | Model, **arguments: Any) -> PreTrainedConfig:
    """The configuration of a model, of a checkpoint, or of the base of an adapter's folder.

    Args:
        model: The model, or its folder or hub id.
        arguments: Of `from_pretrained`, for a folder or hub id.
    """
    if not isinstance(model, str):
        return model.config
    base = base_of(model, **hub_arguments(arguments))
    trust = arguments.get("trust_remote_code", False)
    if base is not None:  # the version is that of the adapter's repository
        return AutoConfig.from_pretrained(base, trust_remote_code=trust)
    return AutoConfig.from_pretrained(model, trust_remote_code=trust, **hub_arguments(arguments))


def complete_processor(processor: Processor | None, model: str | Model, args: Arguments, **sides: str) -> Processor:
    """A processor that can train: the given one, or the model's own, from the same origin as its weights.

    With `append_eos` its chat template ends each reply.

    TRL tokenizes replies without images, which PaliGemma's own processor refuses, and AutoProcessor cannot load Qwen,
    InternVL and SmolVLM without torchvision.

    Args:
        processor: The user's; used as it is, or in the variant that can train, and with the `padding_side` of `sides`.
        model: The model, or its folder or hub id.
        args: The configuration; its `model_init_kwargs` are used for a folder or hub id.
        sides: `padding_side` and `truncation_side` of a processor that is loaded here.

    Raises:
        ValueError: The processor is to be loaded, and the model was made in memory.
    """
    if processor is not None:
        found: Processor = as_trainable(processor)
        if "padding_side" in sides:
            _pad_on(sides["padding_side"], found)
    else:
        source, arguments = source_of(model), loading_arguments(model, args)
        sees = hasattr(config_of(model, **arguments), "vision_config")
        loaded = (load_processor if sees else AutoProcessor.from_pretrained)(source, **arguments, **sides)
        assert isinstance(loaded, Processor)
        found = loaded
    return with_reply_ends(found) if args.append_eos else found


def _pad_on(side: str, processor: Processor) -> None:
    """Lets a processor pad on one side, and says so if it did on the other.

    TRL pads the prompts of a rollout on the left, and their token types where the processor pads: on the other side,
    Qwen-VL, Gemma 3 and PaliGemma would take text for images, without an error.
    """
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if tokenizer.padding_side == side:
        return
    logger.warning(
        "The processor pads on the %s, and rollouts are padded on the %s: `padding_side` of its tokenizer is now "
        '"%s". Load it with `padding_side="%s"` to avoid this message.',
        tokenizer.padding_side,
        *(side, side, side),
    )
    tokenizer.padding_side = side


# Model


def prepare_model(model: Model, args: Arguments) -> None:
    """Makes a model resumable, freezes its vision tower if asked to, and logs its trainable parameters by part."""
    keep_parameter_names(base_model(model))
    keep_4bit_layers_trainable(model)
    if args.freeze_vision_tower:
        freeze_vision_tower(model)
    waste = wasted_precision(model)
    if waste is not None:
        logger.warning(waste)
    logger.info("Trainable parameters of %s:\n%s", type(model).__name__, trainable_parameter_table(model))


def wasted_precision(model: Model) -> str | None:
    """A warning if frozen weights, or the arithmetic beside 4-bit ones, are in float32 on an accelerator."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.device.type != "cpu"]
    in_float32 = sum(parameter.numel() for parameter in frozen if parameter.dtype == torch.float32)
    if in_float32 > 1e9:
        return (
            f"{type(model).__name__} holds {4 * in_float32 / 2**30:.0f} GiB of frozen weights in float32, TRL's "
            'default for a model by name. `model_init_kwargs={"dtype": "bfloat16"}` halves them.'
        )
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if frozen and getattr(quantization, "bnb_4bit_compute_dtype", None) == torch.float32:
        return (
            f"The 4-bit weights of {type(model).__name__} are multiplied in float32. "
            "`BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16)` is several times as fast."
        )
    return None


def why_no_shared_prefix(
    model: Model, args: SharingArguments, own_collator: bool, further: Mapping[str, bool]
) -> str | None:
    """Why prompts are computed once per reply, as one sentence; None if no reason that all trainers share applies.

    Args:
        model: What is trained.
        args: The configuration.
        own_collator: Whether the user passed a data collator.
        further: The trainer's own reasons, and whether they apply.
    """
    virtual_tokens = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    reasons = {
        "`share_prefix` is off": not args.share_prefix,
        "the data collator is not the trainer's own": own_collator,
        "`torch_compile` would compile again for each packed batch": args.torch_compile,
        "the adapter puts virtual tokens before the prompt": virtual_tokens,
        **further,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def layers_to_wrap(model: nn.Module) -> list[str] | None:
    """The classes of layers that FSDP shards one by one: those that the model calls unsplittable, and has.

    transformers collects the names from every class of a family, and accelerate stops at the first that this model
    lacks ("Could not find the transformer layer class CLIPTextEmbeddings in the model").
    """
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(getattr(model, "_no_split_modules", None) or ())) or None


# Learning rates


def give_own_learning_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Moves `parameters` into optimizer groups of their own with learning rate `rate`; other settings stay.

    Call it before the learning rate scheduler is made: the scheduler scales each group's own rate.
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if not moved:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        settings = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
        optimizer.add_param_group({**settings, "params": moved, "lr": rate})


def keep_float_outputs(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Lets FSDP2 give outputs as the model computes them, not rounded to the precision of its parameters.

    Accelerate sets `output_dtype` to bfloat16 with the rest of the policy, and log-probabilities then come in steps of
    1/128 or more, scores in steps of 2^-10: small margins become ties.

    Args:
        plugin: The accelerator's; None, and FSDP1's, stay as they are.
    """
    if plugin is None or plugin.fsdp_version != 2 or plugin.mixed_precision_policy is None:
        return
    policy = plugin.mixed_precision_policy
    assert not isinstance(policy, dict | str)  # accelerate has parsed it
    plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


class PreparedTrainer(Trainer):
    """Overrides of `Trainer` in all our trainers: a mixin before TRL's trainer."""

    args: PartOptions
    model: Model
    processing_class: Processor
    train_dataset: Rows | NumberedRows | None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Trainer; `resume_from_checkpoint=True` skips an incomplete checkpoint of a killed run."""
        if resume_from_checkpoint is True:
            assert self.args.output_dir is not None  # TRL's configurations have a default
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True` finds no complete checkpoint in {self.args.output_dir}. Start "
                    "from the beginning without it, or give the path of a checkpoint."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; under FSDP the layers to wrap are chosen for this model, unless the user chose.

        It runs before TRL wraps a reference, so policy and reference give their outputs in the same precision.
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        keep_float_outputs(plugin)
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = layers_to_wrap(self.model)
        if plugin is not None and plugin.fsdp_version == 2:
            reduce_gradient_of_head(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading_what_was_saved():
            super()._load_optimizer_and_scheduler(checkpoint)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """As in TRL, with our text: the method, the rows, and how to load the model."""
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        assert self.args.output_dir is not None  # TRL's configurations have a default
        folder = Path(self.args.output_dir)
        columns = getattr(self.train_dataset, "column_names", None) or ()
        write_card(
            folder / "README.md",
            self.card_facts(),
            name=self.hub_model_id or model_name or folder.name,
            base=self.model.config._name_or_path,
            columns=[name for name in columns if name != ROW_NAME],
            model=self.model,
            args=self.args,
        )

    def card_facts(self) -> CardFacts:
        """The facts about this trainer's method for the model card."""
        raise NotImplementedError

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in TRL, with the projector's parameters in groups of their own if they have their own learning rate."""
        optimizer = super().create_optimizer(model)
        rate = self.args.projector_learning_rate
        if rate is not None:
            named = self.model.named_parameters()
            give_own_learning_rate(optimizer, [p for name, p in named if part_of(name) == "projector"], rate)
        return optimizer
