"""Sentences of a reply: where they end, where they may be cut, and how a yes / no answer is swapped.

Everything works on characters, so that the unchanged parts of a reply stay the same, character by character.
"""

import re
from random import Random

# Never the end of a sentence, whatever follows.
_TITLES = re.compile(
    r"mrs?|ms|dr|prof|st|sr|jr|rev|gen|sen|rep|gov|capt|lt|col|sgt|mt|vs|cf|fig|e\.g|i\.e", re.IGNORECASE
)
# The end of a sentence unless a small letter or a number follows; so are words with a full stop inside (p.m.).
_SHORT = re.compile(r"etc|approx|inc|ltd|co|corp|ave|blvd|dept|est|max|min|ca|al", re.IGNORECASE)
_CLOSING = r"[\"'”’»)\]}」』）】*_`]*"
_END = re.compile(
    rf"[.!?…]+{_CLOSING}(?=\s|$)"  # western marks need a space or the end after them: 3.5, a.jpg, www.site.org
    rf"|[。！？｡．]+{_CLOSING}"  # full-width marks do not
    r"|[^\S\n]*\n"  # a line ends an item of a list, a heading, a verse
)
_LIST_MARKER = re.compile(r"\s*(?:[-*•–]|\(?(?:\d{1,3}|[A-Za-z])[.)])\s*")
_INITIAL = re.compile(r"(?:^|\s)[A-Z]\.$")
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘«]+$")
# A character of a script without spaces is a word of its own; an inner apostrophe, hyphen or point breaks no word.
_SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+(?:[-'’.,:/@][^\W{_SPACELESS}]+)*")
_YES_NO = re.compile(r"(\s*)(yes|no)\b(?![-'’]|\s+one\b)", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space after it: `"".join` gives the text back.

    A sentence ends with `.`, `!`, `?` or `…` before white space, with a full-width mark, or with a line break before
    anything but a small letter; closing quotes and brackets belong to it. Decimals, file names, addresses,
    abbreviations, initials and the numbers of a list end none. A text without an end is one sentence.
    """
    sentences, start = [], 0
    while (end := sentence_end(text, start, is_complete=True)) is not None:
        space = len(text[end:]) - len(text[end:].lstrip())
        sentences.append(text[start : end + space])
        start = end + space
    return [*sentences, text[start:]] if start < len(text) else sentences


def sentence_end(text: str, start: int = 0, *, is_complete: bool) -> int | None:
    """The end of the first sentence from `start` on, without the white space that follows it.

    Args:
        text: The text so far.
        start: Where the sentence begins.
        is_complete: Whether the text is finished. If more of it may come, an end is only certain once something
            follows it: "3." may become "3.5", and a closing quote may be missing.

    Returns:
        The end as an index, or None if no sentence ends here.
    """
    for match in _END.finditer(text, start):
        body = text[start : match.end()].rstrip()
        if not _WORD.search(body):
            continue
        rest = text[match.end() :]
        follows = rest.lstrip()
        # An initial waits for the word after it: "J. K" may be "J. K." or "J. Kittens".
        is_open = not follows or (len(follows) == 1 and _INITIAL.search(body))
        if is_open and not is_complete:
            return None
        if _ends(body, follows, is_line=match.group().endswith("\n")):
            return start + len(body)
    return None


def pivots(sentence: str) -> list[int]:
    """Where a sentence may be cut, as numbers of characters: after each of its words but the last.

    The marker of a list item stays with the first word, and the full stop of an abbreviation with its word. A
    sentence of one word has no such place.
    """
    marker = _LIST_MARKER.match(sentence)
    ends = [match.end() for match in _WORD.finditer(sentence, marker.end() if marker else 0)]
    return [end for end in ends[:-1] if sentence[end] != "."]


def swap_yes_no(sentence: str) -> str:
    """The sentence with its first word swapped if that is yes or no, in the same case.

    Words that only begin like these are left alone ("Nobody", "Notice", "Yesterday"), and so is "no one".

    Source: 2407.02477, Algorithm 1.
    Differs: the published expression has no word boundary.
    """
    match = _YES_NO.match(sentence)
    if match is None:
        return sentence
    word = match.group(2)
    other = "no" if word.lower() == "yes" else "yes"
    if word.isupper():
        other = other.upper()
    elif word[0].isupper():
        other = other.capitalize()
    return sentence[: match.start(2)] + other + sentence[match.end() :]


def maybe_swapped(sentence: str, random: Random) -> str:
    """`swap_yes_no(sentence)` with probability one half."""
    return swap_yes_no(sentence) if random.random() < 0.5 else sentence


def first_sentence(text: str) -> str:
    """A text up to the end of its first sentence, or all of it, without white space at its end."""
    end = sentence_end(text, is_complete=True)
    return text[:end].rstrip()


def _ends(body: str, follows: str, is_line: bool) -> bool:
    """Whether a sentence ends after `body`, whose last characters may end one."""
    small = follows[:1].islower()
    if is_line:
        return not small
    if not follows:
        return True
    core = body.rstrip("\"'”’»)]}」』）】*_`")
    if core != body and core[-1] in ".!?…" and small:  # "Stop!" he said
        return False
    if core.endswith(("...", "…")):
        return not small
    return not (core.endswith(".") and _is_abbreviated(body, core, follows))


def _is_abbreviated(body: str, core: str, follows: str) -> bool:
    """Whether the full stop that ends `core` belongs to its last word."""
    line = core.rpartition("\n")[2].strip()
    if _LIST_MARKER.fullmatch(line):
        return True
    word = _LAST_WORD.search(core[:-1])
    if word is None:
        return False
    name, before = word.group(), core[: word.start()].split()
    small_or_number = follows[:1].islower() or follows[:1].isdigit()
    if _TITLES.fullmatch(name):
        return True
    if name.lower() == "no":  # "No. 5", but not the answer "No."
        return bool(before) and follows[:1].isdigit()
    if _SHORT.fullmatch(name) or "." in name:
        return small_or_number or (name.isupper() and "." in name)
    if len(name) == 1 and name.isupper():  # an initial: John F. Kennedy, J. K. Rowling
        return (bool(before) and before[-1][0].isupper()) or re.match(r"[A-Z]\.", follows) is not None
    return False
