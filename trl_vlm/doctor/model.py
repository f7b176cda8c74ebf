"""What the trainers will make of a model, read from the model itself; nothing is computed."""

from collections import Counter
from collections.abc import Callable
from functools import partial

from peft import LoraConfig

from trl_vlm.data.model_check import about_reply_end
from trl_vlm.doctor.findings import Finding, attempt, note
from trl_vlm.doctor.samples import preference_batch
from trl_vlm.doctor.subject import Subject, adapter_of
from trl_vlm.models.families import FAMILIES, SHARING_FAMILIES
from trl_vlm.models.feature_cache import why_not_cached
from trl_vlm.models.generation import ends_of_reply
from trl_vlm.models.image_tokens import image_token_id, placeholders_per_row
from trl_vlm.models.parts import PARTS, number_of, part_of
from trl_vlm.models.prefix_sharing.sharing import why_not_shareable, why_pairs_not_shareable
from trl_vlm.models.reply_ends import reply_end
from trl_vlm.trainers.adapters import LORA_PRESETS, lora_targets
from trl_vlm.trainers.preparation import layers_to_wrap


def describe(subject: Subject) -> list[Finding]:
    """A line for each thing that decides how the model is trained."""
    lines: dict[str, Callable[[Subject, str], Finding]] = {
        "family": family,
        "parts": parts,
        "precision": precision,
        "attention": attention,
        "end of a reply": end,
        "image tokens": image_tokens,
        "shared prompts": sharing,
        "image features": features,
        "FSDP wraps": wrapped_layers,
        **{f"LoRA preset {preset}": partial(lora_preset, preset=preset) for preset in LORA_PRESETS},
    }
    if adapter_of(subject.model) is not None:
        lines["adapter"] = adapter
    return [attempt(name, partial(line, subject, name)) for name, line in lines.items()]


def family(subject: Subject, name: str) -> Finding:
    """Whether the tests know the family."""
    kind = subject.inner.config.model_type
    text = f"{kind} ({type(subject.inner).__name__})"
    if kind in SHARING_FAMILIES:
        return Finding(name, "ok", f"{text}, one that the tests train")
    known = "known in part" if kind in FAMILIES else "unknown to the tests"
    return note(name, f"{text}, {known}: what is computed below is what vouches for it")


def parts(subject: Subject, name: str) -> Finding:
    """How many parameters each part has; a part without any cannot be frozen or adapted by its name."""
    counts: Counter[str] = Counter()
    for parameter_name, parameter in subject.model.named_parameters():
        counts[part_of(parameter_name)] += number_of(parameter)
    text = ", ".join(f"{part} {counts[part] / 1e6:,.1f} M" for part in PARTS if counts[part])
    if not counts["vision tower"]:
        return Finding(name, "differs", f"{text}; no vision tower is found by its name, so it cannot be frozen")
    return note(name, text)


def precision(subject: Subject, name: str) -> Finding:
    """The types of the weights."""
    counts: Counter[str] = Counter()
    for parameter in subject.model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += number_of(parameter)
    text = ", ".join(f"{kind} {count / 1e6:,.1f} M" for kind, count in counts.most_common())
    quantization = getattr(subject.inner.config, "quantization_config", None)
    return note(name, text if quantization is None else f"{text}; quantized ({type(quantization).__name__})")


def attention(subject: Subject, name: str) -> Finding:
    """The attention of the language model and, where it is another, of the vision tower."""
    config = subject.inner.config
    text = str(config.get_text_config()._attn_implementation)
    tower = getattr(getattr(config, "vision_config", None), "_attn_implementation", text)
    return note(name, text if tower == text else f"{text}, vision tower {tower}")


def end(subject: Subject, name: str) -> Finding:
    """The token that ends a reply, and whether sampling stops at it."""
    text, token = about_reply_end(subject.processor), reply_end(subject.processor)
    tokenizer = subject.processor.tokenizer
    ends = ends_of_reply(subject.inner, subject.processor) if subject.template is None else []
    if not ends:
        return Finding(name, "ok", text)
    last = tokenizer.eos_token if token is None else token
    if tokenizer.convert_tokens_to_ids(last) in ends:
        return Finding(name, "ok", f"{text}; sampling stops at it")
    stops = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ends)))
    reason = f"sampling stops at {stops}; put it into `eos_token_id` of generation_config.json, or replies do not end"
    return Finding(name, "differs", f"{text}, and {reason}")


def image_tokens(subject: Subject, name: str) -> Finding:
    """The placeholder, and how many an image of 112 x 84 pixels becomes."""
    of_model, of_processor = image_token_id(subject.inner.config), image_token_id(subject.processor)
    token = subject.processor.tokenizer.convert_ids_to_tokens(of_model)
    if of_model != of_processor:
        other = subject.processor.tokenizer.convert_ids_to_tokens(of_processor)
        return Finding(
            name, "differs", f"the model's is {token!r} ({of_model}), the processor's {other!r} ({of_processor})"
        )
    batch = preference_batch(subject.trained_processor, shares_prefix=False)
    count = placeholders_per_row(batch["input_ids"], subject.processor)[0]
    return Finding(name, "ok" if count else "differs", f"{token!r}, {count} of them for an image of 112 x 84 pixels")


def sharing(subject: Subject, name: str) -> Finding:
    """Whether the trainers will compute a prompt once for all replies to it."""
    config = subject.inner.config
    reason = (why_not_shareable if subject.template is None else why_pairs_not_shareable)(config)
    if reason is not None:
        return note(name, f"off: {reason}")
    if config.model_type in SHARING_FAMILIES:
        return note(name, "on")
    return note(name, "on if the first batch of a training comes out the same in both ways")


def features(subject: Subject, name: str) -> Finding:
    """Whether an image is encoded once for all passes that read it."""
    with subject.frozen():
        reason = why_not_cached(subject.inner)
    if reason is not None:
        return note(name, f"encoded in each pass: {reason}")
    return note(name, "encoded once for all passes of a rollout or pair, where vision tower and projector are frozen")


def wrapped_layers(subject: Subject, name: str) -> Finding:
    """The classes of layers that the trainers give to FSDP."""
    layers = layers_to_wrap(subject.inner)
    if layers is None:
        text = "the model names no layers: set `fsdp_transformer_layer_cls_to_wrap`, or use ZeRO-3"
        return Finding(name, "not possible", text)
    return note(name, ", ".join(layers))


def lora_preset(subject: Subject, name: str, preset: str) -> Finding:
    """How many layers a preset of `--lora_target_modules` reaches."""
    targets = lora_targets(subject.inner, preset)
    kinds = sorted({target.rpartition(".")[2] for target in targets})
    return note(name, f"{len(targets)} layers ({', '.join(kinds)})")


def adapter(subject: Subject, name: str) -> Finding:
    """What the adapter is."""
    config = adapter_of(subject.model)
    assert config is not None
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    rank = f", rank {config.r}" if isinstance(config, LoraConfig) else ""
    return note(name, f"{kind}{rank} on {config.base_model_name_or_path}")
