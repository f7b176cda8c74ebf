"""Checks of all trainers: options that exclude each other, negative rates, a model that is blind to its images."""

from collections.abc import Mapping

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from trl_vlm.models.generation import evaluating
from trl_vlm.models.unsharded import is_sharded
from trl_vlm.trainers.types import Model

# Settings of a text model by which its logits are more than the head's output; models and TRL read them apart.
_LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
)
# Log-probabilities of one token may differ by this much, in nats: rounding in bfloat16.
_SAME_LOG_PROBS = 0.05
# A difference below this is rounding, in nats or units of reward.
BLIND_BELOW = 1e-6


def refuse(what: str, options: Mapping[str, tuple[bool, str]]) -> None:
    """Stops at the first option that is set and cannot be combined with something else.

    Args:
        what: What the options exclude, as the message names it: "`pair_source`", "Dense DPO".
        options: For each option, by its name in the message: whether it is set, and why they exclude each other.

    Raises:
        ValueError: An option is set.
    """
    for name, (is_set, reason) in options.items():
        if is_set:
            raise ValueError(f"{name} cannot be combined with {what}: {reason}. Unset one of the two.")


def refuse_negative(values: Mapping[str, float | None], why: str) -> None:
    """Stops at the first value below zero, or that is no number; None is a value that is not set.

    Raises:
        ValueError: A value is negative or nan.
    """
    for name, value in values.items():
        if value is not None and not value >= 0:
            raise ValueError(f"`{name}` is {value}; it must not be negative: {why}. Set it to 0 or more.")


def refuse_images_on_some_processes(has_images: Tensor) -> None:
    """Stops where weights are split among the processes, and some of them would wait for the others' vision tower.

    Args:
        has_images: Of the batch of each process, 1 if it has an image.

    Raises:
        RuntimeError: Some have, and others have not.
    """
    if 0 < has_images.sum() < len(has_images):
        raise RuntimeError(
            "One process has a batch with images and another one without. With sharded parameters (ZeRO-3, FSDP) "
            "all processes must run the vision tower together. Give every batch an image (a larger "
            "`per_device_train_batch_size`, or rows with and without images in separate runs), or use ZeRO-2."
        )


def refuse_pathless_reference(model: str | Model, peft_config: PeftConfig | None, remedy: str) -> None:
    """Stops where TRL would load the reference from the path of a model that was made in memory and has none.

    Args:
        model: The model, or where it comes from.
        peft_config: The adapters that it gets; its base is then the reference.
        remedy: What this trainer offers, the first of three.

    Raises:
        ValueError: The model has no path, and is not its own reference without its adapter.
    """
    if isinstance(model, str | PeftModel) or peft_config is not None or model.config._name_or_path:
        return
    raise ValueError(
        f"The model is a {type(model).__name__} that was made in memory, so its reference cannot be loaded. {remedy}, "
        "or save the model with its processor and pass the folder, or train an adapter (`peft_config`), whose base is "
        "the reference."
    )


def other_pixels(pixels: Tensor) -> Tensor:
    """Other images of the same shape, so that every other input stays the same: each pixel changes by at least one.

    Zeros stay: Idefics3 and SmolVLM pad a row's tiles with them, and count a tile with another value as one more.
    """
    moved = torch.where(pixels.abs() < 0.5, pixels + 1, -pixels)
    return torch.where(pixels == 0, pixels, moved)


def check_depends_on_pixels(output: Tensor, output_on_other_pixels: Tensor, what: str) -> None:
    """Stops before training a model that does not look at its images.

    Args:
        output: Any shape, what the model computes for a batch with images.
        output_on_other_pixels: The same shape, for the same batch with other pixels.
        what: What the outputs are, for the message.
    """
    difference = (output.float() - output_on_other_pixels.float()).abs().max().item()
    if difference < BLIND_BELOW:
        raise RuntimeError(
            f"The {what} do not depend on the pixels: other images change them by {difference:.1e}. The model is "
            "blind to its images (a projector initialized to zeros, image tokens cut off, pixels lost by a collator "
            "or a generation backend), and would learn from the text alone. Check the checkpoint and the processor, "
            "or pass `check_pixels=False` if this is meant."
        )


def check_log_probs(model: Model, temperature: float = 1.0) -> None:
    """Stops before training where TRL's log-probabilities are not those of the model.

    TRL computes them from hidden states and the head, with the scaling that the text model's configuration names. A
    vision-language model may leave that scaling out (Aya Vision, Cohere2 Vision do), and then generates from another
    distribution than the one that is trained. Models without such a setting are not run, nor sharded ones.

    Args:
        model: With TRL's fused head, whole on this process.
        temperature: Of the head.

    Raises:
        RuntimeError: The two differ.
    """
    text = model.config.get_text_config()
    settings = {name: vars(text)[name] for name in _LOGIT_SETTINGS if vars(text).get(name) is not None}
    if not settings or is_sharded(model):
        return
    image = vars(model.config).get("image_token_id")
    tokens = [token for token in range(min(16, text.vocab_size)) if token != image]
    ids = torch.tensor([tokens], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        found = model(**inputs, labels=ids, fused_lm_head=True).log_probs.float()  # (1, T-1)
        logits = model(**inputs).logits[:, :-1].float() / temperature  # (1, T-1, V)
    wanted = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    difference = (found - wanted.to(found.device)).abs().max().item()
    if difference > _SAME_LOG_PROBS:
        raise RuntimeError(
            f"TRL's log-probabilities of {model.config.model_type} are not the model's own: they differ by up to "
            f"{difference:.2f} nats, because TRL reads {settings} of the text model's configuration and the model "
            "does not. Load the model yourself, set these to None in `model.config.get_text_config()`, and pass it."
        )
