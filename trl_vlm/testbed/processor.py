"""The testbed's processor: an ordinary `LlavaProcessor` over a word-level vocabulary, which needs no torchvision."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.testbed.sentences import COLORS, NOUNS, PLACES, SIZES
from trl_vlm.testbed.world import CELL_PIXELS, GRID, IMAGE_PIXELS

IMAGE_TOKENS = GRID * GRID  # one per cell
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>")
NOTHING = "nothing"  # the word for an empty cell
_CAPTION_WORDS = ("facts", ":", ".", "yes", "no", NOTHING, "is", "there", "a", "i", "see", "the", "describe", "image")
_JUDGE_WORDS = ("how", "accurate", "and", "helpful", "reply", "score")
WORDS = _CAPTION_WORDS + _JUDGE_WORDS + tuple(sorted(NOUNS))
PLACE_WORDS = tuple(place.split()[-1] for place in PLACES)
ATTRIBUTES = (SIZES, tuple(COLORS), PLACE_WORDS)
# Behind all others, which keep their ids in a world with attributes.
ATTRIBUTE_WORDS = (*SIZES, *COLORS, *PLACE_WORDS, "on", "in")

JUDGE_TEMPLATE = JudgeTemplate(
    request="how accurate and helpful is the reply",
    facts="facts : {bullets} . ",
    bullet="{fact}",
    separator=" ",
    opening="score",
    facts_first=True,
)
"""A judge turn within the vocabulary, short: a reward model reads it after every reply. The facts stand where the
supervised stage has taught the model to read them: before the request."""

# No marker opens the assistant's turn: the kind stays the last token of a question's prompt. `generation` marks the
# assistant's tokens for `return_assistant_tokens_mask`. Every turn but the first begins with a space, which the
# tokenizer ignores; it keeps the rendered text readable and a rendered prompt a prefix of the whole conversation.
CHAT_TEMPLATE = """\
{{- '<bos>' -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['user', 'assistant'] -%}
        {{- raise_exception("The testbed's chat template knows the roles user and assistant, not " + message['role']) -}}
    {%- endif -%}
    {%- set blocks = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] -%}
    {%- if message['role'] == 'user' -%}
        {%- for block in blocks if block['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
        {{- '<user>' -}}
        {%- for block in blocks if block['type'] == 'text' -%}{{- ' ' + block['text'] -}}{%- endfor -%}
    {%- else -%}
        {%- generation -%}
            {%- for block in blocks if block['type'] == 'text' -%}{{- ' ' + block['text'] -}}{%- endfor -%}
            {{- ' <eos>' -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""  # noqa: E501 - Jinja's line breaks are not ours to choose


def build_tokenizer(attributes: bool = False) -> PreTrainedTokenizerFast:
    """One token per word; decoding gives the words separated by spaces; an unknown word becomes `<unk>`."""
    words = SPECIAL_TOKENS + WORDS + (ATTRIBUTE_WORDS if attributes else ())
    vocabulary = {token: index for index, token in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>"},
        model_max_length=512,
        clean_up_tokenization_spaces=False,  # "a cup ." stays as it is
    )


def build_processor(attributes: bool = False) -> LlavaProcessor:
    """A processor for the testbed's pictures and words; save it and `AutoProcessor` loads it.

    A conversation reads `<bos><image>... <user> request reply <eos> <user> request reply <eos>`. Images stand before
    the turn's `<user>`, wherever they are within the turn.

    Args:
        attributes: Whether its vocabulary has the words of a world with attributes.
    """
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
        do_center_crop=False,
        crop_size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
        image_mean=[0.2, 0.2, 0.2],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(attributes),
        patch_size=CELL_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" then drops
        chat_template=CHAT_TEMPLATE,
    )


class EncodedTexts(NamedTuple):
    """Token ids padded on the right, and which of them are real."""

    input_ids: Tensor  # (B, T)
    real: Tensor  # (B, T), bool


def encode_texts(processor: LlavaProcessor, conversations: Sequence[Sequence[dict[str, str]]]) -> EncodedTexts:
    """The texts of conversations that begin with one image each, without the images.

    The ids are those of the processor's own call. That call takes several times as long, since it would process
    an image again for every text about it.
    """
    texts = processor.apply_chat_template([_with_image(turns) for turns in conversations], tokenize=False)
    texts = [text.replace(processor.image_token, processor.image_token * IMAGE_TOKENS) for text in texts]
    batch = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return EncodedTexts(batch["input_ids"], batch["attention_mask"].bool())


def _with_image(conversation: Sequence[dict[str, str]]) -> list[dict]:
    first, *rest = conversation
    return [{**first, "content": [{"type": "image"}, {"type": "text", "text": first["content"]}]}, *rest]
