"""The memory of a training before anything is loaded, and what to change where it does not fit a card."""

import copy
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

from accelerate.commands.config.config_args import load_config_from_file
from trl import DPOConfig, ModelConfig, RewardConfig

from trl_vlm.models.memory import GIB, Memory, empty_model
from trl_vlm.scripts.arguments import accumulation
from trl_vlm.scripts.expected import Layout, expected_memory
from trl_vlm.scripts.launcher import launch_options, read_options, refuse_unknown
from trl_vlm.scripts.tokens import Tokens, micro_batch, shared_micro_batch
from trl_vlm.trainers.preparation import config_of, model_options

DEFAULT_TOKENS = 1024


@dataclass(frozen=True)
class Estimate:
    """A training whose memory is estimated; `expected_memory` reads it as it reads a job.

    Attributes:
        script: Options of the script.
        training: Options of the trainer.
        model: Options of the model.
        tokens: Of the longest sequence: prompt, images and reply.
        layout: The devices.
        prompt_tokens: Those of its prompt and images, so that it is known what replies share; 0: unknown.
        replies: To a row of preferences.
    """

    script: Any
    training: Any
    model: ModelConfig
    tokens: int
    layout: Layout
    prompt_tokens: int = 0
    replies: int = 2

    @property
    def model_name(self) -> str:
        """Folder or hub id of the model."""
        return self.model.model_name_or_path or ""

    @cached_property
    def micro_batch(self) -> Tokens:
        """The sequences of a micro-batch, with what the trainer shares of them."""
        if not self.prompt_tokens:
            return micro_batch(self.training, self.tokens, self.replies)
        # That of a model has the attention that it will get.
        config = empty_model(config_of(self.model_name, **model_options(self.training))).config
        reply = self.tokens - self.prompt_tokens
        return shared_micro_batch(self.training, config, self.prompt_tokens, reply, self.replies)

    @property
    def memory(self) -> Memory:
        """The estimate.

        Raises:
            ValueError: transformers knows no model for its configuration.
        """
        found = expected_memory(self, self.micro_batch, self.layout)
        if found is None:
            raise ValueError(f"{self.model_name}: transformers knows no vision-language model for its configuration.")
        return found


class Lengths(NamedTuple):
    """What is known of the longest row.

    Args:
        tokens: Of its longest sequence; None: prompt and reply say it, or else `DEFAULT_TOKENS`.
        prompt: Of its prompt with the images.
        reply: Of its longest reply; None: where replies are sampled, the longest that a method allows.
        replies: To a row of preferences; None: two.
    """

    tokens: int | None = None
    prompt: int | None = None
    reply: int | None = None
    replies: int | None = None


def estimate_of(script: str, arguments: Sequence[str], lengths: Lengths | int, prog: str | None = None) -> Estimate:
    """The training that a command line describes, on the GPUs that it will have, whatever this machine has.

    Args:
        script: The script, as a module with `make_parser`.
        arguments: Options of the script and of `accelerate launch`.
        lengths: Of the longest row, or the tokens of its longest sequence.
        prog: What the help calls the program.

    Raises:
        ValueError: A wrong option, or no model.
    """
    launch = launch_options(script, arguments, prog)
    parser = import_module(script).make_parser(prog=prog)
    parser.set_defaults(dtype="bfloat16", bf16=None)  # what the script takes on a GPU
    given, training, model, from_file, others = read_options(parser, launch.training_script_args)
    refuse_unknown(parser, from_file, others)
    layout = layout_of(launch)
    if not (training.bf16 or training.fp16):
        layout = layout._replace(in_16_bits=False)
    if given.total_batch_size is not None:
        steps = accumulation(given.total_batch_size, training.per_device_train_batch_size, layout.devices)
        again = [*launch.training_script_args, "--gradient_accumulation_steps", str(steps)]
        given, training, model, *_ = read_options(parser, again)
    if not model.model_name_or_path:
        raise ValueError("`--model_name_or_path` is missing: a folder or a hub id.")
    training.model_init_kwargs = {"dtype": model.dtype} | (training.model_init_kwargs or {})
    lengths = Lengths(lengths) if isinstance(lengths, int) else lengths
    return Estimate(given, training, model, *_tokens_of(lengths, given, training, layout))


def _tokens_of(lengths: Lengths, script: Any, training: Any, layout: Layout) -> tuple[int, Layout, int, int]:
    """The last fields of an `Estimate`.

    Raises:
        ValueError: The lengths contradict each other or the method.
    """
    tokens, prompt, reply, replies = lengths
    has_pairs = isinstance(training, DPOConfig | RewardConfig)
    if replies is not None and (not isinstance(training, DPOConfig) or replies < 2):
        remedy = "Leave it out" if has_pairs else "The method's own option is `--num_generations`"
        raise ValueError(f"`--replies {replies}`: a row of DPO has two replies or more. {remedy}.")
    if prompt is None and reply is None:
        return tokens or DEFAULT_TOKENS, layout, 0, replies or 2
    if tokens is not None:
        raise ValueError("`--tokens` is prompt and reply together. Give it, or the other two.")
    if reply is None:
        reply = getattr(training, "max_completion_length", None) or getattr(script, "max_new_tokens", None)
    if prompt is None or reply is None:
        raise ValueError("Give `--prompt-tokens` and `--reply-tokens` together: what is shared follows from both.")
    return prompt + reply, layout, prompt, replies or 2


def layout_of(launch: Namespace) -> Layout:
    """The devices that the options of `accelerate launch` ask for; one, in bfloat16, where they say nothing."""
    settings: Any = load_config_from_file(launch.config_file) if launch.config_file else None
    devices = launch.num_processes or getattr(settings, "num_processes", None) or 1
    precision = launch.mixed_precision or getattr(settings, "mixed_precision", None) or "bf16"
    kind = str(getattr(getattr(settings, "distributed_type", "NO"), "value", "NO"))
    if kind == "DEEPSPEED" or launch.use_deepspeed:
        stage = launch.zero_stage or getattr(settings, "deepspeed_config", {}).get("zero_stage", 2)
        return Layout(devices, int(stage), True, precision != "no")
    return Layout(devices, 3 if kind == "FSDP" or launch.use_fsdp else 0, False, precision != "no")


def report(estimate: Estimate, available: float | None = None) -> str:
    """The estimate as lines: each role, the peak, and what to change where it is more than there is.

    Args:
        estimate: The training.
        available: Memory of a card in GB (10^9 bytes), as it is sold; None: nothing is compared.
    """
    memory = estimate.memory
    rows = [(role.name, role.weights, role.gradients + role.optimizer) for role in memory.roles]
    lines = [f"{'GiB on each device':<34}{'weights':>9}{'training':>10}"]
    lines += [f"{name:<34}{weights / GIB:>9.1f}{training / GIB:>10.1f}" for name, weights, training in rows]
    sequences = f"activations of {estimate.tokens:,} tokens a sequence"
    lines.append(f"{sequences:<34}{'':>9}{memory.activations / GIB:>10.1f}")
    batch = estimate.micro_batch
    if batch.prompt:
        lines.append(f"  ({batch.sequences} replies to {batch.prompts} of {batch.prompt:,} tokens, computed once)")
    if memory.generation:
        lines.append(f"{'or keys and values, sampling':<34}{'':>9}{memory.generation / GIB:>10.1f}")
    if memory.features:
        lines.append(f"{'image features, at most':<34}{'':>9}{memory.features / GIB:>10.1f}")
    lines.append(f"{'peak, an estimate':<34}{'':>9}{memory.total / GIB:>10.1f}")
    if available is not None:
        lines += _fit(estimate, memory, available)
    return "\n".join(lines)


def _fit(estimate: Estimate, memory: Memory, available: float) -> Iterator[str]:
    # A tenth is what the arithmetic leaves out.
    room = available * 1e9 / 1.1
    if memory.total <= room:
        yield f"It fits {available:g} GB, a tenth left for what is not counted."
        return
    yield f"It does not fit {available:g} GB: {room / GIB:.1f} GiB, a tenth left for the rest. Change in turn:"
    for change, changed in smaller(estimate):
        peak = changed.memory.total
        if peak < memory.total:
            yield f"  {change:<52}{peak / GIB:>6.1f} GiB{': fits' if peak <= room else ''}"
        if peak <= room:
            return
    yield "Take a smaller model, or shorter rows."


def smaller(estimate: Estimate) -> Iterator[tuple[str, Estimate]]:
    """Changes that save memory, each with those before it, as options and the training that they make."""
    for name, value in (("gradient_checkpointing", True), ("per_device_train_batch_size", 1)):
        if getattr(estimate.training, name) != value:
            estimate = replace(estimate, training=_with(estimate.training, {name: value}))
            yield f"--{name} {value}", estimate
    if not estimate.model.use_peft:
        lora = {"use_peft": True, "lora_target_modules": "language-model"}
        estimate = replace(estimate, model=_with(estimate.model, lora))
        yield "--use_peft --lora_target_modules language-model", estimate
    if not estimate.model.load_in_4bit:
        estimate = replace(estimate, model=_with(estimate.model, {"load_in_4bit": True}))
        yield "--load_in_4bit", estimate
    devices = max(8, estimate.layout.devices)
    if estimate.layout.stage < 3:
        sharded = estimate.layout._replace(devices=devices, stage=3, has_deepspeed=True)
        yield f"--accelerate_config zero3, {devices} cards", replace(estimate, layout=sharded)


def _with(options: Any, changes: dict[str, Any]) -> Any:
    """A copy with other values; the configurations check themselves when they are made, which this passes over."""
    changed = copy.copy(options)
    vars(changed).update(changes)
    return changed
