"""What a run is expected to need on one device, for the plan: tokens of its sequences and memory. Estimates."""

import os
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedConfig, ProcessorMixin, TrainingArguments
from trl import DPOConfig, GRPOConfig, ModelConfig, RewardConfig, RLOOConfig, get_peft_config

from trl_vlm.data.model_check import ModelCheck
from trl_vlm.data.named_rows import undecoded
from trl_vlm.models import memory
from trl_vlm.models.loading import base_of
from trl_vlm.models.memory import Activations, Counts, Layers, Memory, Precision, RoleMemory, Sharding, Training
from trl_vlm.models.parts import freeze_vision_tower
from trl_vlm.scripts.tokens import SAMPLE_ROWS, Tokens, micro_batch
from trl_vlm.trainers.adapters import complete_peft_config
from trl_vlm.trainers.ppo.config import PPOConfig
from trl_vlm.trainers.preparation import config_of, model_options

# Optimizer states per parameter; others are taken for Adam, which has two.
_STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1}


class Layout(NamedTuple):
    """The devices of a run, and how they share a model.

    Args:
        devices: On all machines.
        stage: ZeRO's; 0 is data parallel, and FSDP splits as stage 3 does.
        has_deepspeed: Whether DeepSpeed trains.
        in_16_bits: Whether forward passes run in 16 bits.
    """

    devices: int
    stage: int
    has_deepspeed: bool
    in_16_bits: bool

    @classmethod
    def of_run(cls, training: TrainingArguments) -> "Layout":
        """That of the processes which run now."""
        devices, in_16_bits = PartialState().num_processes, bool(training.bf16 or training.fp16)
        plugin: Any = training.deepspeed_plugin
        if plugin is not None:
            return cls(devices, plugin.zero_stage, True, in_16_bits)
        is_fsdp = bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        return cls(devices, 3 if is_fsdp else 0, False, in_16_bits)


class MemoryOptions(Protocol):
    """What decides on a run's memory."""

    @property
    def script(self) -> Any: ...  # noqa: D102  its options differ from script to script

    @property
    def training(self) -> Any: ...  # noqa: D102

    @property
    def model(self) -> ModelConfig: ...  # noqa: D102

    @property
    def model_name(self) -> str: ...  # noqa: D102


class Options(MemoryOptions, Protocol):
    """What a script's job has decided."""

    @property
    def processor(self) -> ProcessorMixin: ...  # noqa: D102

    @property
    def train_dataset(self) -> Dataset | IterableDataset: ...  # noqa: D102


def expected_tokens(job: Options, purpose: str) -> Tokens | None:
    """The sequences of a micro-batch; None where the first rows are no messages, or the model has no template.

    Args:
        job: Its options and rows.
        purpose: What the rows are for: a key of `PURPOSES`.
    """
    if getattr(job.processor, "image_processor", None) is None or job.processor.chat_template is None:
        return None
    first = islice(undecoded(job.train_dataset), SAMPLE_ROWS)
    rows = [row for row in first if isinstance(row.get("messages", row.get("prompt")), list)]
    check = ModelCheck(job.model_name, purpose)
    for row in rows:
        check(row)
    if not check.tokens:
        return None
    training, longest = job.training, max(check.tokens)
    if purpose == "ppo":  # the replies are sampled
        longest += getattr(training, "max_completion_length", None) or getattr(job.script, "max_new_tokens", None) or 0
    elif isinstance(getattr(training, "max_length", None), int):
        longest = min(longest, training.max_length)
    return micro_batch(training, longest)


def expected_memory(job: MemoryOptions, tokens: Tokens | None, layout: Layout | None = None) -> Memory | None:
    """The memory of each model of the run, apart; None for a family that transformers does not know by its config.

    Args:
        job: Its options.
        tokens: Of a micro-batch; None leaves activations out.
        layout: The devices; None: those of the processes that run now.
    """
    training, layout = job.training, layout or Layout.of_run(job.training)
    config = config_of(job.model_name, **model_options(training))
    try:
        counts = _counts(job, config)
    except ValueError:
        return None
    precision = _precision(training, job.model, config, layout)
    sharding = Sharding.of_stage(layout.stage, layout.devices)
    frozen, passes = _frozen_roles(job, counts, precision, sharding), 1
    name = "reward model" if isinstance(training, RewardConfig) else "policy"
    roles = [memory.trained(name, counts, precision, sharding)]
    if isinstance(training, PPOConfig):
        passes = 2  # the critic runs in the policy's forward
        critic = Counts(0, 0, 0, counts.adapter) if _shares_base(job, counts) else counts
        roles.append(memory.trained("critic", critic, precision, sharding))
    if tokens is None:
        return Memory([*roles, *frozen], 0.0)
    kept = _activations(job, config, counts, tokens, passes, 2.0 if layout.in_16_bits else precision.weights)
    sampled = _sampling(training, config, tokens, precision.weights)
    accumulates = layout.has_deepspeed or training.gradient_accumulation_steps > 1
    features = 0.0 if counts.tower else _kept_features(training, config, tokens, precision)
    return Memory([*roles, *frozen], kept.kept, sampled, kept.layer, accumulates, features)


def _kept_features(training: Any, config: PreTrainedConfig, tokens: Tokens, precision: Precision) -> float:
    """Image features that wait for further passes: at most as many as there are tokens."""
    options = vars(training)
    if not options.get("image_feature_cache") or options.get("image_features_on_cpu"):
        return 0.0
    rows = training.per_device_train_batch_size * (options.get("steps_per_generation") or 1)
    longest = tokens.prompt or tokens.longest
    every = rows // (options.get("num_generations") or 1) * longest * config.get_text_config().hidden_size
    return min(options["image_feature_cache"] * memory.GIB, every * precision.weights)


def _activations(
    job: MemoryOptions, config: PreTrainedConfig, counts: Counts, tokens: Tokens, passes: int, value: float
) -> Activations:
    """Of language model, its head and, where it trains, the vision tower."""
    training, text = job.training, config.get_text_config()
    kind = _kind_of_training(job, counts, value)
    common: dict[str, Any] = {"checkpointing": training.gradient_checkpointing, "value": value, "passes": passes}
    language = memory.activations(Layers.of_text(text), tokens.computed, kind, copied=tokens.copied, **common)
    tower = Layers.of_tower(config.vision_config) if counts.tower and hasattr(config, "vision_config") else None
    seen = Activations(0.0)
    if tower is not None:
        seen = memory.activations(tower, _patches(config, tokens), kind, **common)
    head = 0.0
    if not isinstance(training, RewardConfig):
        head = memory.head_bytes(text, tokens.read, value, trains=counts.adapter == 0)
    return Activations(language.kept + seen.kept + head, max(language.layer, seen.layer))


def _kind_of_training(job: MemoryOptions, counts: Counts, value: float) -> Training:
    if counts.adapter == 0:
        return Training.ALL
    if job.model.lora_dropout > 0 and not getattr(job.training, "disable_dropout", False):
        return Training.DROPOUT
    # PEFT makes adapters in float32, and each casts what it reads.
    return Training.ADAPTERS if value == memory.FLOAT32 else Training.SEVERAL_COPIES


def _patches(config: PreTrainedConfig, tokens: Tokens) -> int:
    """Tokens of the vision tower: of one image for each sequence or shared prompt, or as many as its tokens are."""
    tower = vars(config.vision_config)
    size, patch = tower.get("image_size"), tower.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int):
        return tokens.images * (size // patch) ** 2
    return tokens.images * (tokens.prompt or tokens.longest) * tower.get("spatial_merge_size", 1) ** 2


def _sampling(training: Any, config: PreTrainedConfig, tokens: Tokens, value: float) -> float:
    """Keys and values of the replies that transformers samples at once, and what reading their prompts works with."""
    if not isinstance(training, GRPOConfig | RLOOConfig) or training.use_vllm:
        return 0.0
    replies = training.per_device_train_batch_size * (training.steps_per_generation or 1)
    replies = min(replies, getattr(training, "sampling_batch_size", None) or replies)
    text, prompts = config.get_text_config(), replies * (tokens.prompt or tokens.longest)
    kept = memory.keys_and_values(text, replies * tokens.longest, value)
    return kept + prompts * Layers.of_text(text).working_per_token(value)


def _counts(job: MemoryOptions, config: PreTrainedConfig) -> Counts:
    """Of the model that trains, with the adapter that it gets or comes with."""
    model, adapter = memory.empty_model(config), get_peft_config(job.model)
    if adapter is None and base_of(job.model_name) is not None:
        adapter = PeftConfig.from_pretrained(job.model_name, inference_mode=False)
    if adapter is not None:
        with torch.device("meta"):
            return memory.counts_of(get_peft_model(model, complete_peft_config(adapter, model, job.training)))
    if job.training.freeze_vision_tower:
        freeze_vision_tower(model)
    return memory.counts_of(model)


def _frozen_roles(job: MemoryOptions, counts: Counts, precision: Precision, sharding: Sharding) -> list[RoleMemory]:
    """The reference, which is the policy's own base where there is an adapter, and the reward model."""
    roles, training = [], job.training
    if counts.adapter == 0 and _needs_reference(training):
        roles.append(memory.held("reference", counts, precision, sharding))
    judge = _judge(job)
    if judge is not None:
        own = memory.counts_of(memory.empty_model(config_of(judge)))
        if _shares_base(job, counts):
            own = Counts(0, 0, 0, counts.adapter)
        roles.append(memory.held("reward model", own, precision))  # whole on each process
    return roles


def _judge(job: MemoryOptions) -> str | None:
    """Where the reward model lies."""
    return getattr(job.script, "reward_model_name_or_path", None) or getattr(job.script, "reward_model", None)


def _shares_base(job: MemoryOptions, counts: Counts) -> bool:
    """Whether all roles are adapters on one base; decided here by the names of the bases alone."""
    asked, judge = getattr(job.training, "share_base", False), _judge(job)
    if asked is not None or counts.adapter == 0:
        return bool(asked)
    policy = base_of(job.model_name) or job.model_name
    return judge is None or base_of(judge) == policy


def _needs_reference(training: TrainingArguments) -> bool:
    if isinstance(training, PPOConfig):
        return training.kl_coef > 0
    if isinstance(training, GRPOConfig | RLOOConfig):
        return training.beta != 0
    if not isinstance(training, DPOConfig):
        return False
    options = vars(training)
    before = training.precompute_ref_log_probs or options.get("reference_cache") is not None
    return not before and not options.get("reference_free")


def _precision(training: Any, model: ModelConfig, config: PreTrainedConfig, layout: Layout) -> Precision:
    dtype = model_options(training).get("dtype", "float32")
    dtype = getattr(config, "dtype", None) if dtype == "auto" else dtype
    casts = layout.has_deepspeed and layout.in_16_bits  # DeepSpeed trains 16-bit weights, with float32 beside them
    in_16_bits = str(dtype).removeprefix("torch.") in ("bfloat16", "float16") or casts
    linear = memory.FOUR_BIT if model.load_in_4bit else memory.EIGHT_BIT if model.load_in_8bit else None
    optimizer = str(getattr(training.optim, "value", training.optim))
    return Precision(
        weights=memory.BFLOAT16 if in_16_bits else memory.FLOAT32,
        linear=linear,
        states=next((states for name, states in _STATES.items() if name in optimizer), 2),
        state_bytes=1.0 if "8bit" in optimizer else None,
        master=casts,
    )
