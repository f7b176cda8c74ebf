"""The model card: what was trained how, on rows with which columns, and how the result is loaded."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard
from torch import nn

from trl_vlm.models.parts import PARTS, part_of

DPO_PAPER = {
    "title": "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "id": "2305.18290",
}
DENSE_PAPER = {
    "title": "RLHF-V: Towards Trustworthy MLLMs via Behavior Alignment from Fine-grained Correctional Human Feedback",
    "id": "2312.00849",
}
POVID_PAPER = {
    "title": "Aligning Modalities in Vision Large Language Models via Preference Fine-tuning",
    "id": "2402.11411",
}
IMAGE_PAPERS = {
    "mdpo": {
        "title": "mDPO: Conditional Preference Optimization for Multimodal Large Language Models",
        "id": "2406.11839",
    },
    "chip": {
        "title": "CHiP: Cross-modal Hierarchical Direct Preference Optimization for Multimodal LLMs",
        "id": "2501.16629",
    },
    "opa": {
        "title": "Mitigating Hallucinations in Large Vision-Language Models via DPO: On-Policy Data Hold the Key",
        "id": "2501.09695",
    },
}
FACT_RLHF_PAPER = {
    "title": "Aligning Large Multimodal Models with Factually Augmented RLHF",
    "id": "2309.14525",
}
ALIGNMENT_PAPER = {"title": "Understanding Alignment in Multimodal LLMs: A Comprehensive Study", "id": "2407.02477"}
NEEDS_PACKAGE = "transformers has no class for this head: the model needs trl_vlm to load."
PACKAGES = ("trl-vlm", "trl", "transformers", "torch", "datasets", "peft")

FULL = """\
from transformers import AutoModelForImageTextToText
from trl_vlm.models.processors import load_processor  # AutoProcessor needs torchvision for some families

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = load_processor("{name}")"""
ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}")"""
REWARD = """\
from PIL import Image
from trl_vlm.rewards import RewardModelReward  # the model, its processor and its judge template

score = RewardModelReward("{name}")
score(
    prompts=[[{{"role": "user", "content": "What is in the image?"}}]],
    completions=[[{{"role": "assistant", "content": "A red bus."}}]],
    images=[[Image.open("bus.jpg")]],
    facts=[["The bus is red."]],
)"""


@dataclasses.dataclass
class CardFacts:
    """What a trainer contributes to its card.

    Attributes:
        method: Sentences about what was optimized.
        loading: Code with a place `{name}` for the model; None for that of a generative model.
        needs_package: Why the code needs this package; empty if transformers alone can load the model.
        papers: `title`, `id` on arXiv, and where known `citation`.
        sections: Further parts of the card, text by heading.
    """

    method: Sequence[str]
    loading: str | None = None
    needs_package: str = ""
    papers: Sequence[Mapping[str, str]] = ()
    sections: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_card(
    path: Path, facts: CardFacts, name: str, base: str, columns: Sequence[str], model: nn.Module, args: Any
):
    """Replaces the text of TRL's card by ours; its metadata stays.

    Args:
        path: The card.
        facts: What the trainer says.
        name: Of the trained model.
        base: Path or hub id of the model that training started from; "" if it was made in memory.
        columns: Of the training rows.
        model: What was trained.
        args: Its configuration.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.text = "\n\n".join(_parts(facts, name, base, columns, model, args)) + "\n"
    card.save(path)


def merged_card(name: str, adapter: str, base: str, folder: Path) -> str:
    """The card of an adapter that was merged into its base.

    Args:
        name: Of the merged model.
        adapter: Folder or hub id of the adapter; of a folder its name alone is told.
        base: Folder or hub id of its base.
        folder: What was merged.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_reward = any("ForSequenceClassification" in kind for kind in config.get("architectures") or ())
    front = {"library_name": "transformers", "tags": ["trl-vlm", *(["reward-model"] if is_reward else [])]}
    front |= {"base_model": base} if base and not os.path.isdir(base) else {}
    adapter, base = map(_public_name, (adapter, base))
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {name}"]
    parts += [f"The adapter `{adapter}`, merged into `{base}` by `trl-vlm merge` of trl_vlm {_version('trl-vlm')}."]
    parts += ["## How to load", *([NEEDS_PACKAGE] if is_reward else [])]
    return "\n\n".join([*parts, f"```python\n{(REWARD if is_reward else FULL).format(name=name)}\n```"]) + "\n"


def _parts(facts: CardFacts, name: str, base: str, columns: Sequence[str], model: nn.Module, args: Any) -> list[str]:
    on_hub = bool(base) and not os.path.isdir(base)
    origin = f"[{base}](https://huggingface.co/{base})" if on_hub else "a local model"
    base = base if on_hub else os.path.basename(os.path.normpath(base))
    text = [
        f"# {name}",
        f"A vision-language model trained from {origin} with trl_vlm, which extends "
        "[TRL](https://github.com/huggingface/trl).",
        "## How to load",
    ]
    text += [facts.needs_package] if facts.needs_package else []
    loading = facts.loading or _generative(model)
    text += [f"```python\n{loading.format(name=name, base=base)}\n```", "## Training", " ".join(facts.method)]
    text += [f"Rows had the columns {_listed(columns)}."] if columns else []
    text += [f"Trained parts: {', '.join(_trained_parts(model))}."]
    text += [_options(args)]
    for heading, section in facts.sections.items():
        text += [f"## {heading}", section]
    text += ["## Papers", *map(_paper, facts.papers)] if facts.papers else []
    versions = [f"- {package}: {_version(package)}" for package in PACKAGES]
    return [*text, "## Versions", "\n".join(versions)]


def _public_name(place: str) -> str:
    """A hub id, or of a folder its last part: the rest of the path is the author's own."""
    return os.path.basename(os.path.normpath(place)) if os.path.isdir(place) else place


def _generative(model: nn.Module) -> str:
    """How a generative model is loaded."""
    code = ADAPTER if is_peft_model(model) else FULL
    return code if hasattr(model.config, "vision_config") else code.replace("ForImageTextToText", "ForCausalLM")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _trained_parts(model: nn.Module) -> list[str]:
    """The parts that train, and how: in full or through an adapter."""
    how: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("value_model."):
            how.setdefault(part_of(name), set()).add("adapter" if "lora_" in name else "in full")
    return [f"{part} ({' and '.join(sorted(how[part]))})" for part in PARTS if part in how]


def _options(args: Any) -> str:
    """A table of the options that differ from their defaults, and of those that every reader looks for."""
    always = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed")
    rows = [(name, getattr(args, name)) for name in (*always, "gradient_accumulation_steps")]
    theirs = {field.name for parent in type(args).__mro__[1:] if _is_theirs(parent) for field in _fields(parent)}
    for option in dataclasses.fields(args):
        value = getattr(args, option.name)
        is_path = isinstance(value, str) and os.sep in value
        if option.name not in theirs and value != option.default and not is_path:
            rows.append((option.name, value))
    return "\n".join(["| option | value |", "|---|---|", *(f"| `{name}` | {value} |" for name, value in rows)])


def _is_theirs(parent: type) -> bool:
    return dataclasses.is_dataclass(parent) and not parent.__module__.startswith("trl_vlm.")


def _fields(parent: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(parent)


def _paper(paper: Mapping[str, str]) -> str:
    line = f"- [{paper['title']}](https://huggingface.co/papers/{paper['id']})"
    return f"{line}\n\n```bibtex\n{paper['citation'].strip()}\n```" if "citation" in paper else line


def _version(package: str) -> str:
    from trl_vlm import __version__

    return __version__ if package == "trl-vlm" else version(package)
