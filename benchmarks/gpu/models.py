"""Random models of real shapes, their processor and rows: what `gpu_check` runs, without a network."""

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

WORDS, PROMPT_WORDS, PATCH = 1000, 26, 14
SPECIAL = ("<pad>", "<unk>", "<user>", "<end>", "<image>")
PAD, END, IMAGE = 0, 3, 4
CHAT = (
    "{% for m in messages %}<user> {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} <end> {% endfor %}{% if add_generation_prompt %}<user> {% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model, and of the vision tower before it."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32064
    vision_hidden: int = 1024
    vision_inner: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 1024, 64, 128, 2, 4),
    "2b": Shape(2048, 8192, 24, 32, 8),
    "7b": Shape(4096, 11008, 32, 32, 32),  # LLaVA-1.5-7B
}


def processor(size: int) -> transformers.LlavaProcessor:
    """A LLaVA processor whose words are `w0`, `w1`, ...; images of `size` pixels squared."""
    vocabulary = [*SPECIAL, *(f"w{number}" for number in range(WORDS))]
    core = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", extra_special_tokens={"image_token": "<image>"}
    )
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer, chat_template=CHAT, **settings)


def config(shape: Shape, size: int) -> transformers.LlavaConfig:
    """The configuration of a LLaVA of this shape."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_inner,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": size,
        "patch_size": PATCH,
    }
    text = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "eos_token_id": END,
    }
    ends = {"pad_token_id": PAD, "eos_token_id": END}
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **ends)


def model(shape: str, size: int, device: torch.device, attention: str | None = None) -> transformers.PreTrainedModel:
    """A random model in bfloat16, always the same one, made on the device."""
    torch.manual_seed(0)
    settings = config(SHAPES[shape], size)
    settings._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            made = transformers.LlavaForConditionalGeneration(settings)
    finally:
        torch.set_default_dtype(before)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = END, PAD
    return made.eval()


def rows(count: int, reply_tokens: int, size: int, kind: str = "pairs") -> Dataset:
    """Rows with one image of noise each: "pairs", "prompts", or "completions" of four sentences."""
    random = np.random.RandomState(0)

    def said(role: str, tokens: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(f"w{number}" for number in random.randint(0, WORDS, tokens))}]

    made = []
    for _ in range(count):
        image = Image.fromarray(random.randint(0, 255, (size, size, 3), dtype=np.uint8))
        row = {"images": [image], "prompt": said("user", PROMPT_WORDS)}
        if kind == "pairs":
            row |= {name: said("assistant", reply_tokens - 1) for name in ("chosen", "rejected")}
        if kind == "completions":
            sentences = [said("assistant", reply_tokens // 4)[0]["content"] for _ in range(4)]
            row["completion"] = [{"role": "assistant", "content": " . ".join(sentences) + " ."}]
        made.append(row)
    return Dataset.from_list(made)


def lora(rank: int) -> LoraConfig:
    """Adapters in every linear layer of the language model."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r".*language_model.*(proj)$")
