"""Chat templates that say which of their text are replies, so that a loss over replies alone can be taken.

transformers finds the tokens of replies where a template encloses them in `{% generation %}`. Few do; TRL holds such a
version of some templates, by their exact text, and of none of LLaVA-1.5, PaliGemma and InternVL. `with_reply_marks`
makes one of any template: it renders the conversation up to each reply and up to its end, so the text stays the same.
"""

import copy
import json
import re
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from typing import cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_vlm.models.families import family_of
from trl_vlm.models.image_tokens import image_tokens
from trl_vlm.models.reply_ends import Processor

# A reply goes from what the template asks for it with to its end, the white space behind which belongs to no reply.
# `{{ '' }}` keeps Jinja from trimming what it stands beside.
_MARKED = """\
{%- macro unmarked(messages, add_generation_prompt) %}{{ '' }}TEMPLATE{{ '' }}{% endmacro -%}
{%- macro laid_out(messages, add_generation_prompt) -%}LAYOUT{%- endmacro -%}
{%- set whole = laid_out(messages, add_generation_prompt) -%}
{%- set done = namespace(characters=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set with_reply = laid_out(messages[:loop.index], false) -%}
{%- set before = laid_out(messages[:loop.index0], true) if loop.index0 else '' -%}
{%- if whole.startswith(with_reply) and with_reply.startswith(before) -%}
{%- set reply = with_reply[before|length:].rstrip() -%}
{{- whole[done.characters:before|length] -}}
{%- generation -%}{{- reply -}}{%- endgeneration -%}
{%- set done.characters = before|length + reply|length -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{{- whole[done.characters:] -}}
"""
_AS_IT_IS = "{{- unmarked(messages, add_generation_prompt) -}}"
# PaliGemma's processor puts this token behind the last image, after the places of replies were counted.
_WITH_BOS = """\
{%- set parts = unmarked(messages, add_generation_prompt).rpartition(IMAGE) -%}
{{- parts[0] + parts[1] + (BOS if parts[1] and BOS not in parts[2] else '') + parts[2] -}}
"""

_CONVERSATION = ("What is it?", "An answer.", "And this?", "Another answer.")


def marks_replies(processor: ProcessorMixin | PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says which of its text are replies."""
    template = processor.chat_template
    template = template.get("default", "") if isinstance(template, dict) else template
    return isinstance(template, str) and re.search(r"\{%[-+]?\s*generation\b", template) is not None


def with_reply_marks(processor: Processor) -> Processor:
    """A copy of a processor whose chat template marks every reply and its end; what it renders is the same.

    Args:
        processor: A processor or tokenizer; not modified.

    Raises:
        ValueError: The template cannot be marked so: it renders earlier replies in another way than the last one.
    """
    template = processor.chat_template
    if not isinstance(template, str):
        raise ValueError(
            f"The chat template of {type(processor).__name__} is {'missing' if template is None else 'not one text'}, "
            "so replies cannot be told from questions. Set `processing_class.chat_template`."
        )
    marked = copy.copy(processor)
    marked.chat_template = _marked(template, processor)
    if _marked_replies(marked) != [_CONVERSATION[1], _CONVERSATION[3]]:
        raise ValueError(
            f"The replies of the chat template of {type(processor).__name__} cannot be told from the rest: it renders "
            "them in one way while they are the last, and in another one later. Enclose them in "
            "`{% generation %}` and `{% endgeneration %}`, or unroll conversations into rows of one reply each "
            "(`prompt`, `completion`)."
        )
    return marked


def _marked(template: str, processor: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    layout = _AS_IT_IS
    if isinstance(processor, ProcessorMixin) and family_of(processor).prefix_is_bidirectional:
        layout = _WITH_BOS.replace("IMAGE", json.dumps(image_tokens(processor)[0]))
        layout = layout.replace("BOS", json.dumps(processor.tokenizer.bos_token))
    # Jinja drops a line feed at the end of a template, and only there.
    return _MARKED.replace("LAYOUT", layout).replace("TEMPLATE", template.removesuffix("\n"))


def _marked_replies(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[str]:
    """The marked texts of a conversation of two replies, without their end tokens."""
    is_processor = isinstance(processor, ProcessorMixin)
    messages = [
        {
            "role": ("user", "assistant")[place % 2],
            "content": [{"type": "text", "text": text}] if is_processor else text,
        }
        for place, text in enumerate(_CONVERSATION)
    ]
    tokenizer = processor.tokenizer if is_processor else processor
    # Of the tokenizer: a processor gives one text as a batch.
    found = cast(
        Mapping[str, list[int]],
        tokenizer.apply_chat_template(
            messages,
            chat_template=cast(str, processor.chat_template),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        ),
    )
    tokens = zip(found["input_ids"], found["assistant_masks"], strict=True)
    runs = [[token for token, _ in run] for is_reply, run in groupby(tokens, key=itemgetter(1)) if is_reply]
    return [cast(str, tokenizer.decode(run, skip_special_tokens=True)).strip() for run in runs]
