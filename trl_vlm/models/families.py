"""Everything that this package knows about a family of vision-language models, in one table.

A family is a `model_type` of transformers. What is not in the table is read from the model itself, or not assumed:
prefix sharing proves itself on the first batch, and the image-token check looks no further than whether placeholders
and images come together. A new family is one entry here and its maker in `tests/families.py`.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig, ProcessorMixin

# What a batch holds besides token ids and masks, under the names that processors and TRL's rollouts give it.
IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "image_position_ids",
    "batch_num_images",
)
# What it holds for every token.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def is_image_input(name: str) -> bool:
    """Whether an input of a model, of a family that no test knows too, belongs to images and not to tokens."""
    return name in IMAGE_INPUTS or name.startswith(("pixel", "image"))


# How many features an image has, so that its placeholders can be counted:
#   "patches"   one for each patch, and perhaps a class token (LLaVA)
#   "anyres"    LLaVA-NeXT's tiles, without padding, with ends of lines
#   "grids"     `image_grid_thw`, merged in squares (Qwen-VL)
#   "masks"     `image_seq_len` for each tile that `pixel_attention_mask` shows (Idefics3)
#   "tiles"     `image_seq_length` for each entry of `pixel_values`
#   "at most"   up to `image_seq_length` for each image
Counting = Literal["patches", "anyres", "grids", "masks", "tiles", "at most"]


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Args:
        shares_prefix: Tests compare shared prefixes, and images that are encoded apart from each other, with the plain
            path for this family.
        positions: "text" counts tokens, "grid" is M-RoPE, three positions a token; None asks the model, whose method
            `compute_3d_position_ids` says that it has the second kind.
        first_position: The first of them.
        own_masks: The generative class whose `create_masks_for_generate` says which tokens of a prompt see later ones.
        one_mask: The backbone takes one mask for all layers, though its language model takes one for each kind.
        prefix_is_bidirectional: All of the prompt sees all of it, and a sequence encoded as a whole is all prompt.
        reply_type: `token_type_ids` of a reply's tokens.
        processors: Names of its processor classes, by which a batch tells its family.
        counting: See `Counting`; None if it is not known.
        placeholder: The token of one image feature, where the processor's own `image_token_id` is another one.
        needs_image_counts: The forward must be told how many images each row has (`batch_num_images`).
        tower: Components of parameter names in the vision tower, beyond those of most families.
        projector: The same for the projector.
    """

    shares_prefix: bool = False
    positions: Literal["text", "grid"] | None = None
    first_position: int = 0
    own_masks: str | None = None
    one_mask: bool = False
    prefix_is_bidirectional: bool = False
    reply_type: int = 0
    processors: tuple[str, ...] = ()
    counting: Counting | None = None
    placeholder: str | None = None
    needs_image_counts: bool = False
    tower: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()


_TOWER = ("vision_tower", "vision_model", "visual", "vision_encoder", "vision_backbone")
_PROJECTOR = ("multi_modal_projector", "language_projection", "vision_projection")
HEADS = frozenset({"lm_head", "score", "v_head"})

FAMILIES: dict[str, Family] = {
    "llava": Family(shares_prefix=True, processors=("LlavaProcessor",), counting="patches"),
    "llava_next": Family(
        shares_prefix=True,
        processors=("LlavaNextProcessor",),
        counting="anyres",
        projector=("image_newline",),  # an embedding of its own that the projected patches are interleaved with
    ),
    "qwen2_vl": Family(
        shares_prefix=True,
        positions="grid",
        processors=("Qwen2VLProcessor",),
        counting="grids",
        projector=("merger",),  # inside `visual`
    ),
    "qwen2_5_vl": Family(shares_prefix=True, positions="grid", processors=("Qwen2_5_VLProcessor",), counting="grids"),
    "qwen3_vl": Family(
        shares_prefix=True,
        positions="grid",
        processors=("Qwen3VLProcessor",),  # Qwen3-VL-MoE and Qwen3.5 have the same
        counting="grids",
        projector=("deepstack_merger_list",),
    ),
    "qwen3_vl_moe": Family(shares_prefix=True, positions="grid"),
    "qwen3_5": Family(positions="grid"),
    "qwen3_5_moe": Family(positions="grid"),
    "idefics2": Family(projector=("connector",)),
    "idefics3": Family(
        shares_prefix=True,
        processors=("Idefics3Processor",),
        counting="masks",
        projector=("connector",),
    ),
    "smolvlm": Family(shares_prefix=True, processors=("SmolVLMProcessor",), counting="masks"),
    "gemma3": Family(
        shares_prefix=True,
        own_masks="Gemma3ForConditionalGeneration",  # image tokens see each other
        processors=("Gemma3Processor",),
        counting="tiles",
    ),
    "gemma4": Family(
        shares_prefix=True,
        own_masks="Gemma4ForConditionalGeneration",
        processors=("Gemma4Processor",),
        counting="at most",
        projector=("embed_vision",),
    ),
    "paligemma": Family(
        shares_prefix=True,
        first_position=1,
        own_masks="PaliGemmaForConditionalGeneration",
        one_mask=True,
        prefix_is_bidirectional=True,
        reply_type=1,
        processors=("PaliGemmaProcessor",),
        counting="tiles",
    ),
    "internvl": Family(shares_prefix=True, processors=("InternVLProcessor",), counting="tiles"),
    "llava_onevision": Family(shares_prefix=True, needs_image_counts=True),
    "ovis2": Family(processors=("Ovis2Processor",), placeholder="<IMG_ATOM>"),
    "janus": Family(projector=("aligner",)),
    "blip-2": Family(projector=("qformer", "query_tokens")),
}

SHARING_FAMILIES = tuple(sorted(name for name, family in FAMILIES.items() if family.shares_prefix))
TOWERS = frozenset(_TOWER).union(*(family.tower for family in FAMILIES.values()))
PROJECTORS = frozenset(_PROJECTOR).union(*(family.projector for family in FAMILIES.values()))

_UNKNOWN = Family()
_BY_PROCESSOR = {name: family for family in FAMILIES.values() for name in family.processors}


def family_of(source: PreTrainedConfig | ProcessorMixin) -> Family:
    """What is known of the family of a model's config or of a processor; the defaults for an unknown family."""
    if isinstance(source, PreTrainedConfig):
        return FAMILIES.get(source.model_type, _UNKNOWN)
    known = (_BY_PROCESSOR[kind.__name__] for kind in type(source).__mro__ if kind.__name__ in _BY_PROCESSOR)
    return next(known, _UNKNOWN)
