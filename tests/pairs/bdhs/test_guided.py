from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import families
from trl_vlm.data.sentences import sentence_end
from trl_vlm.pairs.bdhs.guided import cut_sentences, joined
from trl_vlm.pairs.draws import Draws
from trl_vlm.pairs.reply_tokens import ReplyTokens, added_text

REPLIES = (
    "A red square on a white wall. There is a dog and a green tree.\n\nThe picture shows 3.5 cats.",
    "No. A blue circle.",
    "The picture shows a cat",
    "- a dog\n- a green tree",
)


def llama_like():
    """A tokenizer that writes the space before a word into its token, and before the first word, too."""
    words = ["▁USER:", "▁?", "▁ASSISTANT:", "▁A", "▁cat", "▁sits", ".", "▁No"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*words, "<unk>"])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(".", "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")

    def template(messages, tokenize, add_generation_prompt=False):
        turns = [f"{message['role'].upper()}: {message['content'][0]['text']}" for message in messages]
        return " ".join(turns + (["ASSISTANT:"] if add_generation_prompt else []))

    return SimpleNamespace(tokenizer=fast, apply_chat_template=template)


def test_a_reply_is_tokenised_as_it_stands_behind_its_prompt():
    processor = llama_like()
    reply = ReplyTokens.of(processor, "A cat sits. No.")
    assert processor.tokenizer.convert_ids_to_tokens(reply.ids) == ["▁A", "▁cat", "▁sits", ".", "▁No", "."]
    assert reply.ends == [1, 5, 10, 11, 14, 15]
    assert [reply.tokens_before(place) for place in (0, 1, 2, 5, 15)] == [0, 1, None, 2, 6]
    assert processor.tokenizer.convert_ids_to_tokens(reply.ids_behind(processor.tokenizer, 11, " A cat")) == [
        "▁A",
        "▁cat",
    ]


def test_the_text_of_new_tokens_keeps_the_space_before_it():
    processor = llama_like()
    ids = ReplyTokens.of(processor, "A cat sits. No.").ids
    assert added_text(processor.tokenizer, ids[:1], ids[1:]) == " cat sits. No."
    assert added_text(processor.tokenizer, ids[:3], ids[3:]) == ". No."
    assert added_text(processor.tokenizer, [], ids) == "A cat sits. No."


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_kept_tokens_spell_the_sentences_before_and_the_prefix(family):
    processor = families.load_processor(family)

    def decode(ids):
        """Without the space that some chat templates put before a reply."""
        return processor.tokenizer.decode(ids).lstrip()

    for reply in REPLIES:
        tokens = ReplyTokens.of(processor, reply)
        assert decode(tokens.ids) == reply
        starts = set()
        for iteration in range(6):
            cuts = cut_sentences(tokens, processor.tokenizer, Draws(0, 0, "row"), row=0, iteration=iteration)
            start = 0
            for cut in cuts:
                before = reply[:start]
                end = sentence_end(reply, start, is_complete=True) or len(reply)
                kept = decode(cut.context)
                if cut.continuation.forced_tokens:  # "No" has become "Yes"
                    assert kept == before + cut.prefix and cut.prefix.startswith("Yes")
                    assert (
                        tokens.ids[: cut.continuation.prefix_length] == cut.context[: cut.continuation.prefix_length]
                    )
                else:
                    assert kept == before + cut.prefix and reply[start:end].startswith(cut.prefix)
                    assert tokens.ids[: cut.continuation.prefix_length] == cut.context
                starts.add(cut.prefix)
                start = end + len(cut.separator)
            assert start == len(reply)
            true_rest = [
                processor.tokenizer(reply[len(decode(cut.context)) :], add_special_tokens=False).input_ids
                for cut in cuts
                if not cut.continuation.forced_tokens
            ]
            if len(true_rest) == len(cuts):  # finished as the reference does, the sentences join to the reference
                assert joined(cuts, true_rest, processor.tokenizer) == reply
        assert len(starts) > 1


def test_half_of_the_answers_are_swapped_before_the_cut():
    processor = families.load_processor("llava")
    tokens = ReplyTokens.of(processor, "No, there is a dog.")
    cuts = [
        cut_sentences(tokens, processor.tokenizer, Draws(seed, 0, "row"), row=0, iteration=1)[0] for seed in range(400)
    ]
    swapped = [cut for cut in cuts if cut.prefix.startswith("Yes")]
    assert abs(len(swapped) - 200) < 3 * 10
    assert {cut.prefix for cut in swapped} == {"Yes", "Yes, there", "Yes, there is", "Yes, there is a"}
    assert {cut.prefix for cut in cuts if cut not in swapped} == {"No", "No, there", "No, there is", "No, there is a"}


def test_an_answer_of_one_word_is_swapped_or_written_anew():
    processor = families.load_processor("llava")
    tokens = ReplyTokens.of(processor, "It rains. No.")
    cuts = [
        cut_sentences(tokens, processor.tokenizer, Draws(seed, 0, "row"), row=0, iteration=1)[1] for seed in range(50)
    ]
    assert {cut.prefix for cut in cuts} == {"Yes", ""}
    assert {processor.tokenizer.decode(cut.context).lstrip() for cut in cuts} == {"It rains. Yes", "It rains."}


def test_a_token_that_spells_an_end_and_the_lines_behind_it_is_kept():
    tokens = ReplyTokens("A cat.\n\nRed.", ids=[5, 6, 7, 8, 9], ends=[1, 5, 8, 11, 12], opening="")
    cuts = cut_sentences(tokens, families.load_processor("llava").tokenizer, Draws(0, 0, ""), row=0, iteration=1)
    assert [cut.context for cut in cuts] == [[5], [5, 6, 7]]
    assert [(cut.prefix, cut.separator) for cut in cuts] == [("A", "\n\n"), ("", "")]
