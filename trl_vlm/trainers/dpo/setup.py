"""What `DPOTrainer` prepares before TRL's constructor runs: arguments, processor, adapters, datasets."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from trl_vlm.data.messages import message_text
from trl_vlm.models.parts import part_of
from trl_vlm.models.prefix_sharing.sharing import why_not_shareable
from trl_vlm.models.processors import load_processor, trainable_processor
from trl_vlm.trainers.adapters import sparing_vision_tower
from trl_vlm.trainers.dpo.collator import row_name
from trl_vlm.trainers.dpo.config import DPOConfig

logger = logging.getLogger(__name__)

# Presets for `LoraConfig.target_modules` that never reach the vision tower, by the parts that they do reach.
LORA_PRESETS = {"language-model": {"language model"}, "language-model-and-projector": {"language model", "projector"}}


def complete_arguments(args: trl.DPOConfig | None, model: str | nn.Module) -> DPOConfig:
    """The given arguments as ours; TRL's `DPOConfig` gets our defaults, and None the name that TRL would choose."""
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return DPOConfig(f"{name.split('/')[-1]}-DPO")
    if isinstance(args, DPOConfig):
        return args
    args = copy.copy(args)
    args.__class__ = DPOConfig  # the defaults of our fields are attributes of the class
    return args


def complete_processor(processor: Any, model: str | nn.Module, args: DPOConfig) -> Any:
    """A processor that can train: the given one, or the model's; None where TRL finds the right one by itself.

    TRL tokenises replies without images, which PaliGemma's own processor refuses, and AutoProcessor cannot load Qwen,
    InternVL and SmolVLM without torchvision.
    """
    if processor is None:
        source = model if isinstance(model, str) else model.config._name_or_path
        if not source:
            return None
        kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
        if (args.model_init_kwargs or {}).get("revision") is not None:
            kwargs["revision"] = args.model_init_kwargs["revision"]
        config = AutoConfig.from_pretrained(source, **kwargs) if isinstance(model, str) else model.config
        return load_processor(source, **kwargs) if "vision_config" in config.sub_configs else None
    if isinstance(processor, ProcessorMixin) and not isinstance(processor, trainable_processor(type(processor))):
        stock, wanted = processor, trainable_processor(type(processor))
        if set(wanted.get_attributes()) == set(stock.get_attributes()):
            processor = copy.copy(stock)
            processor.__class__ = wanted  # the same parts; only how a call treats rows without images differs
    return processor


def complete_peft_config(peft_config: PeftConfig | None, model: str | nn.Module, args: DPOConfig) -> PeftConfig | None:
    """The adapter's configuration with presets spelt out, and off the vision tower if that is to be frozen."""
    if peft_config is None:
        return None
    preset = peft_config.target_modules if isinstance(peft_config, LoraConfig) else None
    if isinstance(preset, list | set) and len(preset) == 1:
        (preset,) = preset  # as a command line passes it
    if isinstance(preset, str) and preset in LORA_PRESETS:
        peft_config = copy.deepcopy(peft_config)
        peft_config.target_modules = set(lora_targets(_shell(model, args), preset))
    elif args.freeze_vision_tower:
        peft_config = sparing_vision_tower(peft_config, _shell(model, args))
    return peft_config


def lora_targets(model: nn.Module, preset: str = "language-model") -> list[str]:
    """Names of the linear layers that a preset of `LORA_PRESETS` reaches: none of the vision tower, nor the head."""
    if preset not in LORA_PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(LORA_PRESETS)}.")
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and part_of(f"{name}.weight") in LORA_PRESETS[preset]
    ]
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layer of the {preset}. Name `target_modules` yourself."
        )
    return targets


def _shell(model: str | nn.Module, args: DPOConfig) -> nn.Module:
    """The model, or for a name one of the same layers without weights."""
    if not isinstance(model, str):
        return model
    config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=args.trust_remote_code)


def why_plain(trainer: Any, models: list[nn.Module], own_collator: bool) -> str | None:
    """Why a `DPOTrainer` computes prompts once per reply, as one sentence; None if its models can share them."""
    args = trainer.args
    refusals = {
        "`share_prefix` is off": not args.share_prefix,
        "the data collator is not the trainer's own": own_collator,
        "`compute_metrics` reads logits of whole sequences": trainer.compute_metrics is not None,
        "the auxiliary loss of mixtures of experts counts every token": trainer.aux_loss_enabled,
        "`use_liger_kernel` changes the model's layers": args.use_liger_kernel,
        "`torch_compile` is not tested with it": args.torch_compile,
        "`keep_end` truncation gives the replies of a row different prompts": (
            args.truncation_mode == "keep_end" and args.max_length is not None
        ),
        "the adapter puts virtual tokens before the prompt": is_peft_model(trainer.model)
        and trainer.model.active_peft_config.is_prompt_learning,
    }
    reasons = [reason for reason, applies in refusals.items() if applies]
    reasons += filter(None, (why_not_shareable(model.config) for model in models))
    return reasons[0] if reasons else None


def extra_replies(dataset: Any) -> int:
    """How many replies `rejected_extra` holds in the first row of a dataset; 0 without the column."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return 0
    row = next(iter(dataset), None)
    return len((row or {}).get("rejected_extra") or ())


def checked_pairs(dataset: Any, name: str, bad_pairs: str) -> Any:
    """The dataset, after a look at every pair: empty replies are an error or left out, identical ones reported.

    Raises:
        ValueError: a reply is empty, and `bad_pairs` is "error"; the message names the row.
    """
    if isinstance(dataset, dict):
        return type(dataset)(
            {key: checked_pairs(value, f"{name}[{key}]", bad_pairs) for key, value in dataset.items()}
        )
    if not isinstance(dataset, Dataset) or not {"chosen", "rejected"} <= set(dataset.column_names):
        return dataset
    columns = [column for column in ("prompt", "chosen", "rejected") if column in dataset.column_names]
    empty, identical = _bad_rows(dataset.select_columns(columns))
    if empty and bad_pairs == "error":
        row = empty[0]
        raise ValueError(
            f"Row {row} of {name} ({row_name(dataset.select_columns(columns)[row])}) has an empty reply; so have "
            f"{len(empty)} of {len(dataset)} rows. Remove them, or set `bad_pairs='skip'` to leave them out."
        )
    if bad_pairs == "skip" and (empty or identical):
        leave_out = {*empty, *identical}
        logger.warning(
            "Left out %d of %d rows of %s: %d with an empty reply, %d whose replies are identical.",
            *(len(leave_out), len(dataset), name, len(empty), len(identical)),
        )
        return dataset.select([row for row in range(len(dataset)) if row not in leave_out])
    if identical:
        logger.warning(
            "%d of %d rows of %s have identical replies and add nothing to a preference loss. "
            "`bad_pairs='skip'` leaves them out.",
            *(len(identical), len(dataset), name),
        )
    return dataset


def _bad_rows(dataset: Dataset) -> tuple[list[int], list[int]]:
    """Indices of the rows with an empty reply, and of those with two identical ones."""
    empty, identical = [], []
    for index, row in enumerate(dataset):
        chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
        if not chosen.strip() or not rejected.strip():
            empty.append(index)
        elif chosen == rejected:
            identical.append(index)
    return empty, identical


def _text(reply: Any) -> str:
    if isinstance(reply, str):
        return reply
    if any(message.get("tool_calls") for message in reply):
        return str(reply)
    return "".join(message_text(message) for message in reply if message["role"] == "assistant")


def prepared_extras(dataset: Any, prepared: Any, prepare: Callable[[Any], Any], extra: int, name: str) -> Any:
    """TRL's tokenised rows with `rejected_extra_ids`: TRL tokenises each extra reply in the place of `rejected`.

    Args:
        dataset: the rows as the user gave them.
        prepared: what TRL made of them.
        prepare: TRL's preparation.
        extra: how many replies `rejected_extra` holds.
        name: what the dataset is called in errors.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{name}: `rejected_extra` of text rows needs a dataset with rows by index, not a stream.")
    if "rejected_extra" not in dataset.column_names:
        raise ValueError(
            f"{name}: the column `rejected_extra` is missing, and the training data have it. Add it, or drop it there."
        )
    columns: list[list[list[int]]] = []
    for number in range(extra):
        one = prepare(dataset.map(_ExtraAsRejected(number)))
        if one["prompt_ids"][:] != prepared["prompt_ids"][:]:
            raise ValueError(
                f"{name}: the chat template renders a prompt in two ways, depending on the reply, or `max_length` "
                "drops other rows for the extra replies. Use another template, or raise `max_length`."
            )
        columns.append(one["rejected_ids"][:])
    return prepared.add_column("rejected_extra_ids", [list(replies) for replies in zip(*columns, strict=True)])


class _ExtraAsRejected:
    """Puts an extra reply in the place of the rejected one."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"rejected": row["rejected_extra"][self.number]}
