"""Many continuations of one prompt and reply, with images partly hidden: how BDHS generates its sentences fast.

Each continuation keeps the first tokens of its row's reply and continues from there on its own:

    prompt and image   reply of the row                     two continuations
    p p i i i i p p    a a a a . b b b b b . c c c c .      p p i i p p a a a a . b b | x x x .
                                                            p p i i p p a a a a . b b b b b . c | y y .

What `generate` would compute once per continuation is computed once per row:

* the vision tower: once for all continuations and all calls of `run`;
* prompt and reply: once per call; each continuation reads their keys and values up to its own cut.

Hidden image tokens are also left out of the language model: nothing attends to them, and all others keep their
positions, so the results are the same. Where a sliding window is shorter than the sequence they stay, masked, because
a window counts tokens and not positions.

Under greedy decoding the tokens are those of one `generate(**masked_inputs(...), do_sample=False)` per continuation,
with prompt and kept tokens written out; `tests/models/continuation/test_continuations.py` checks it for ten families.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from trl_vlm.models.continuation.caches import share_out
from trl_vlm.models.continuation.rows import Rows, rows_of
from trl_vlm.models.families import family_of
from trl_vlm.models.generation import Sampler, ends_of_reply
from trl_vlm.models.image_features import ImageFeatures
from trl_vlm.models.loading import is_adapted
from trl_vlm.models.masked_images import check_hidden
from trl_vlm.models.memory import keys_and_values

if TYPE_CHECKING:
    from peft import PeftType


class Continuation(NamedTuple):
    """One continuation.

    row: Whose prompt and reply it continues.
    prefix_length: How many of the reply's tokens it keeps.
    forced_tokens: Tokens that follow them before it chooses its own.
    """

    row: int
    prefix_length: int
    forced_tokens: Sequence[int] = ()


# Called with a continuation's number and its new tokens so far, after each of them; True ends the continuation.
Stop = Callable[[int, list[int]], bool]


def why_not_continuable(model: PreTrainedModel) -> str | None:
    """Why replies of this model cannot be continued from a cache, as one sentence; None if they can."""
    text = model.config.get_text_config()
    kinds = set(vars(text).get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))} keep no keys that could be cut at a token"
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return "its forward takes no ready image features (`mm_encoder_outputs`; transformers 5.23 has it)"
    return None


class Continuations:
    """Continues the replies of a batch of rows, any number of times; see the module's docstring.

    Args:
        model: A generative model, or a PEFT model around one, in evaluation mode.
        batch: B rows as the processor returned them, padded on either side, ending with the opening of the
            assistant's turn.
        replies: B lists of token ids, without the end of the turn; [] for a row whose continuations keep nothing.

    Raises:
        ValueError: The model cannot do this or is in training mode, or the numbers of image tokens and of image
            features differ.
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Tensor], replies: Sequence[Sequence[int]]):
        self._model = _generative(model)
        batch = {name: value.to(self._model.device) for name, value in batch.items()}
        self._rows = rows_of(self._model, batch, replies)
        self._features = ImageFeatures.of(self._model, batch)

    @torch.no_grad()
    def run(
        self,
        hidden: Tensor,
        continuations: Sequence[Continuation],
        *,
        max_new_tokens: int,
        stop: Stop | None = None,
        sampler: Sampler | None = None,
        max_cache_bytes: float | None = None,
    ) -> list[list[int]]:
        """The new tokens of each continuation, forced ones not among them. Other rows cost nothing.

        A continuation ends with an end-of-sequence token of the model's `generation_config`, after the token at which
        `stop` returns True, or after `max_new_tokens`. The token that ended it is returned, too.

        Args:
            hidden: (B, T) bool, image tokens of the batch that nothing attends to, see `masked_images.draw_hidden`.
            continuations: Any number, in any order.
            max_new_tokens: Most new tokens of a continuation.
            stop: See `Stop`.
            sampler: None decodes greedily.
            max_cache_bytes: Most bytes of keys and values at once. If all continuations together need more, they are
                decoded in turns, and no token changes but by rounding; None decodes all at once.

        Raises:
            ValueError: A continuation names a row or a prefix that does not exist, or `hidden` does not fit the batch.

        Differs from `generate`: only the end-of-sequence tokens of the `generation_config` are used. A repetition
        penalty or a top-k of the checkpoint is not applied, so samples are those of the model itself.
        """
        if not continuations:
            return []
        _check_continuations(continuations, self._rows)
        hidden = hidden.to(self._model.device)
        check_hidden(hidden, self._rows.batch_ids, self._model.config)
        hidden = self._rows.without_padding(hidden)
        ends = [self._rows.prompts[each.row] + each.prefix_length for each in continuations]
        room = 1 + max_new_tokens + max(len(each.forced_tokens) for each in continuations)
        self._check_window(continuations, max(ends) - 1 + room)
        replies: list[list[int]] = []
        for turn in self._turns(continuations, hidden, ends, room, max_cache_bytes):
            replies += self._decoded(
                hidden,
                continuations[turn.start : turn.stop],
                max_new_tokens,
                None if stop is None else _renumbered_stop(stop, turn.start),
                None if sampler is None else _renumbered_sampler(sampler, turn.start),
            )
        return replies

    def _turns(
        self,
        continuations: Sequence[Continuation],
        hidden: Tensor,
        ends: Sequence[int],
        room: int,
        max_cache_bytes: float | None,
    ) -> list[range]:
        """The numbers of the continuations that are decoded side by side, turn after turn.

        Args:
            continuations: All of them.
            hidden: (B, L).
            ends: Where each one's first own token is, in tokens of its row.
            room: For tokens of its own, in each.
            max_cache_bytes: See `run`.
        """
        if max_cache_bytes is None:
            return [range(len(continuations))]
        config = self._model.config.get_text_config()
        most = max_cache_bytes / keys_and_values(config, 1, self._model.dtype.itemsize)  # tokens
        kept = torch.ones_like(hidden) if not _all_see_all(self._model.config, max(ends) - 1 + room) else ~hidden
        before = kept.cumsum(1).tolist()  # tokens whose keys are computed, up to each place
        turns, start, rows, longest = [], 0, set(), 0
        for number, (continuation, end) in enumerate(zip(continuations, ends, strict=True)):
            rows, longest = rows | {continuation.row}, max(longest, before[continuation.row][end - 1])
            # Each row's keys are computed once and then copied to its continuations.
            if number > start and longest * len(rows) + (longest + room) * (number + 1 - start) > most:
                turns.append(range(start, number))
                start, rows, longest = number, {continuation.row}, before[continuation.row][end - 1]
        return [*turns, range(start, len(continuations))]

    def _decoded(
        self,
        hidden: Tensor,
        continuations: Sequence[Continuation],
        max_new_tokens: int,
        stop: Stop | None,
        sampler: Sampler | None,
    ) -> list[list[int]]:
        """The new tokens of continuations that are decoded side by side; `hidden` is (B, L)."""
        row = torch.tensor([continuation.row for continuation in continuations], device=hidden.device)
        # The last token that a continuation keeps is the first that decoding feeds: the prefill computes no logits,
        # which would be as large as the vocabulary at every position where some continuation starts.
        last = torch.tensor(
            [self._rows.prompts[continuation.row] + continuation.prefix_length - 1 for continuation in continuations],
            device=hidden.device,
        )
        room = 1 + max_new_tokens + max(len(continuation.forced_tokens) for continuation in continuations)
        cache, seen = self._prefill(hidden, row, last, room)
        decoding = _Decoding(continuations, max_new_tokens, stop, sampler, set(ends_of_reply(self._model)))
        tokens, positions = self._rows.ids[row, last], self._rows.positions[..., row, last]
        while True:
            seen = pad(seen, (0, 1), value=True)
            logits = self._forward(cache, seen, input_ids=tokens[:, None], position_ids=positions[..., None])
            tokens, stay = decoding.step(logits[:, -1])
            if not len(stay):
                return decoding.replies
            positions = positions + 1
            if len(stay) < len(seen):
                positions, seen = positions[..., stay], seen[stay]
                cache.batch_select_indices(stay)

    def _check_window(self, continuations: Sequence[Continuation], length: int) -> None:
        """Refuses what a decoding step would compute wrongly: the last token of a prompt with bidirectional attention.

        In a step of its own a token sees as far back as its window; in a prompt like PaliGemma 2's it sees farther.
        """
        config = self._model.config
        if not family_of(config).prefix_is_bidirectional or _all_see_all(config, length):
            return
        for number, continuation in enumerate(continuations):
            if continuation.prefix_length == 0:
                raise ValueError(
                    f"continuation {number} keeps nothing of the reply of row {continuation.row}: {config.model_type} "
                    f"reads all of a prompt at once, also across its window of "
                    f"{config.get_text_config().sliding_window} tokens, and this continuation cannot. "
                    "Keep at least one token of the reply, or use smaller images."
                )

    def _forward(self, cache: Cache, seen: Tensor, **inputs: Tensor) -> Tensor:
        """The logits of each sequence's last token, (N, 1, V)."""
        state = {"attention_mask": seen.long(), "past_key_values": cache, "use_cache": True}
        return self._model(**inputs, **state, logits_to_keep=1).logits

    def _prefill(self, hidden: Tensor, row: Tensor, last: Tensor, room: int) -> tuple[Cache, Tensor]:
        """Keys and values of what each continuation has before its last token, and which of them it sees, (J, N)."""
        rows = self._rows
        ends = torch.zeros(len(rows.ids), dtype=torch.long, device=row.device).scatter_reduce(0, row, last, "amax")
        if family_of(self._model.config).prefix_is_bidirectional:  # the prompt's first tokens see its last one
            ends = torch.where(ends > 0, ends.maximum(torch.tensor(rows.prompts, device=ends.device)), ends)
        computed = torch.arange(rows.ids.size(1), device=row.device) < ends[:, None]  # (B, L)
        if _all_see_all(self._model.config, int(last.max()) + room):
            computed &= ~hidden
        needed = ends.nonzero()[:, 0]
        index = pad_sequence([computed[each].nonzero()[:, 0] for each in needed], batch_first=True, padding_value=-1)
        real, index = index >= 0, index.clamp(min=0)  # (b, W)
        inputs = {name: value[needed].gather(1, index) for name, value in rows.types.items()}
        inputs["input_ids"] = rows.ids[needed].gather(1, index).masked_fill(~real, rows.filler)
        positions = rows.positions[..., needed, :]
        inputs["position_ids"] = positions.gather(-1, index.expand(*positions.shape[:-2], *index.shape))
        if self._features is not None:
            inputs |= self._features.at(computed[rows.is_image])
        # Without a configuration the cache keeps every key; the model's masks still hold windows to their width.
        cache, seen = DynamicCache(), real & ~hidden[needed].gather(1, index)
        self._forward(cache, seen, **inputs)
        place = torch.searchsorted(needed, row)
        return share_out(cache, seen, place, lengths=computed.cumsum(1)[row, last - 1], room=room)


def _renumbered_stop(stop: Stop, first: int) -> Stop:
    """`stop` for continuations of which number 0 is number `first` of all."""
    return lambda number, tokens: stop(first + number, tokens)


def _renumbered_sampler(sampler: Sampler, first: int) -> Sampler:
    """`sampler` for continuations of which number 0 is number `first` of all."""

    def sampled(input_ids: None, scores: Tensor, sequences: Sequence[int]) -> Tensor:
        return sampler(input_ids, scores, [first + sequence for sequence in sequences])

    return sampled


def _check_continuations(continuations: Sequence[Continuation], rows: Rows) -> None:
    for number, continuation in enumerate(continuations):
        if not 0 <= continuation.row < len(rows.prompts):
            raise ValueError(
                f"continuation {number} is of row {continuation.row}; there are {len(rows.prompts)} rows, "
                "counted from 0."
            )
        if not 0 <= continuation.prefix_length <= rows.replies[continuation.row]:
            raise ValueError(
                f"continuation {number} keeps {continuation.prefix_length} tokens of the reply of row "
                f"{continuation.row}, which has {rows.replies[continuation.row]}."
            )


def _generative(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself: adapters are layers inside it, and work without PEFT's wrapper."""
    if is_adapted(model):
        adapter = model.active_peft_config
        if adapter.is_prompt_learning:
            raise ValueError(
                f"A {cast('PeftType', adapter.peft_type).value} adapter puts virtual tokens before the prompt, which "
                "cannot be continued. Use an adapter that changes layers, as LoRA does."
            )
        model = cast(PreTrainedModel, model.get_base_model())
    reason = why_not_continuable(model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot continue replies: {reason}.")
    if model.training:
        raise ValueError("The model is in training mode, in which dropout changes replies; call `model.eval()` first.")
    return model


def _all_see_all(config: PreTrainedConfig, length: int) -> bool:
    """Whether every token of a sequence of `length` tokens lies within the attention window of every other."""
    text = vars(config.get_text_config())
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    slides = "sliding_attention" in (text.get("layer_types") or ["sliding_attention"])
    return window is None or not slides or length <= window


class _Decoding:
    """The tokens of continuations that are decoded side by side; one that has ended leaves."""

    def __init__(
        self,
        continuations: Sequence[Continuation],
        max_new_tokens: int,
        stop: Stop | None,
        sampler: Sampler | None,
        ends: set[int],
    ):
        self.replies: list[list[int]] = [[] for _ in continuations]
        self._forced = [continuation.forced_tokens for continuation in continuations]
        self._active = list(range(len(continuations)))
        self._steps = 0
        self._max_new_tokens, self._stop, self._sampler, self._ends = max_new_tokens, stop, sampler, ends

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens (M,) of the continuations that continue, and their indices in `logits` (N, V)."""
        tokens = self._chosen(logits)
        active = []
        for index, (number, token) in enumerate(zip(self._active, tokens, strict=True)):
            if self._steps < len(self._forced[number]):
                active.append(index)
                continue
            self.replies[number].append(token)
            if not self._ended(number, token):
                active.append(index)
        self._steps += 1
        self._active = [self._active[index] for index in active]
        stay = torch.tensor(active, dtype=torch.long, device=logits.device)
        return torch.tensor(tokens, device=logits.device)[stay], stay

    def _chosen(self, logits: Tensor) -> list[int]:
        free = [index for index, number in enumerate(self._active) if self._steps >= len(self._forced[number])]
        tokens = [
            forced[self._steps] if self._steps < len(forced := self._forced[number]) else 0 for number in self._active
        ]
        if free:
            scores = logits[free].float()
            if self._sampler is not None:
                scores = self._sampler(None, scores, [self._active[index] for index in free])
            for index, token in zip(free, scores.argmax(-1).tolist(), strict=True):
                tokens[index] = token
        return tokens

    def _ended(self, number: int, token: int) -> bool:
        if token in self._ends or len(self.replies[number]) == self._max_new_tokens:
            return True
        return self._stop is not None and self._stop(number, self.replies[number])
