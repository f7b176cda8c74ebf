"""What a model's processor does with rows: how replies end, how long rows are, whether images match placeholders."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from torch import Tensor
from transformers import ProcessorMixin

from trl_vlm.data.checks import located
from trl_vlm.data.encoding import RewardCollator, encode
from trl_vlm.data.errors import RowError
from trl_vlm.data.faults import Fault
from trl_vlm.data.messages import Conversation
from trl_vlm.data.rows import ROW_NAME, Row, row_images, supervised_conversation
from trl_vlm.models.image_tokens import placeholders_per_row
from trl_vlm.models.processors import control_tokens, load_processor
from trl_vlm.models.reply_ends import reply_end, with_reply_ends

TOO_LONG = "more tokens than --max-length"
NOT_ENCODED = "placeholders and images differ, or the processor refuses it"
THE_ROW = "the row"


class Spread(NamedTuple):
    """Minimum, median and maximum of a number over all rows."""

    least: int
    median: float
    most: int


@dataclass
class ModelCheck:
    """Encodes rows as a trainer does, and records how many tokens they have; see `check_dataset(further=)`.

    Args:
        path: The model's folder or hub id.
        purpose: What the rows are for: a key of `PURPOSES`.
        max_length: A row with more tokens is a fault; None allows any number.
        images: Folder that relative image paths start at.

    Raises:
        ValueError: The model reads no images, or its processor has no chat template.
    """

    path: str
    purpose: str
    max_length: int | None = None
    images: Path | None = None
    tokens: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    refused: int = 0

    def __post_init__(self) -> None:
        """Loads the processor, and checks how it ends a reply."""
        given = load_processor(self.path)
        if not isinstance(given, ProcessorMixin) or given.chat_template is None:
            raise ValueError(
                f"{self.path} has a {type(given).__name__}"
                f"{'' if isinstance(given, ProcessorMixin) else ', which reads no images,'} and "
                f"{'no' if given.chat_template is None else 'a'} chat template. `--model` needs the processor of a "
                "vision-language model with a chat template."
            )
        self.end, self.about_end = reply_end(given), about_reply_end(given)
        self.processor = with_reply_ends(given)
        self.control_tokens = control_tokens(given)

    @property
    def too_long(self) -> int:
        """How many rows have more tokens than `max_length`."""
        return 0 if self.max_length is None else sum(number > self.max_length for number in self.tokens)

    @property
    def tokens_per_row(self) -> Spread | None:
        """Tokens of the longest sequence of a row, image tokens included; None if no row could be encoded."""
        return _spread(self.tokens)

    @property
    def image_tokens_per_row(self) -> Spread | None:
        """Image tokens of a row; None if no row could be encoded."""
        return _spread(self.image_tokens)

    def __call__(self, row: Row) -> list[Fault]:
        """The faults that only the model's processor shows, in a row that is otherwise good."""
        try:
            batch = self._encoded(row)
        except RowError as error:
            self.refused += 1
            return [Fault("images", NOT_ENCODED, str(error))]
        self.tokens.append(int(batch["attention_mask"].sum(-1).max()))
        self.image_tokens.append(max(placeholders_per_row(batch["input_ids"], self.processor)))
        if self.max_length is None or self.tokens[-1] <= self.max_length:
            return []
        reason = (
            f"it has {self.tokens[-1]} tokens with this model, {self.image_tokens[-1]} of them for images, and "
            f"--max-length is {self.max_length}. Use smaller images or a larger limit, or drop the row."
        )
        return [Fault("messages" if "messages" in row else "prompt", TOO_LONG, reason)]

    def _encoded(self, row: Row) -> dict[str, Tensor]:
        images = [located(image, self.images) for image in row_images(row, THE_ROW)]
        if self.purpose == "reward":
            kept = {name: value for name, value in row.items() if name != "image"}
            return RewardCollator(self.processor)([kept | {"images": images, ROW_NAME: THE_ROW}])
        conversations = self._conversations(row)
        return encode(
            self.processor,
            conversations,
            [images] * len(conversations),
            add_generation_prompt=self.purpose == "ppo",
            names=[THE_ROW] * len(conversations),
        )

    def _conversations(self, row: Row) -> Sequence[Conversation]:
        """The prompt with each reply."""
        if self.purpose == "sft":
            return [supervised_conversation(row)]
        prompt = list(row["prompt"])
        if self.purpose == "ppo":
            return [prompt]
        replies = [row["chosen"], row["rejected"], *(row.get("rejected_extra") or ())]
        return [[*prompt, *reply] for reply in replies]


def about_reply_end(processor: ProcessorMixin) -> str:
    """The token that ends a reply, and where it comes from."""
    end = reply_end(processor)
    if end is None:
        return f"{processor.tokenizer.eos_token!r}, appended by the trainers: the chat template leaves replies open"
    return f"{end!r}, from the chat template"


def _spread(numbers: Sequence[int]) -> Spread | None:
    return Spread(min(numbers), median(numbers), max(numbers)) if numbers else None
