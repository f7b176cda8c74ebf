"""POVID in the loss: a rejected reply made of the model's greedy tokens given a noised image.

Every token is predicted after the true tokens of the chosen reply y, so this is one forward pass without generation:

    z_t = argmax p(. | noisy image, prompt, y_<t)          the rejected tokens
    s(z) = sum_t log p(z_t | image, prompt, y_<t)          their score, read with the clean image

Source: POVID's published training code, as described in docs/methods/dpo.md.
Differs: the published code lets policy and reference each score their own tokens, so that their difference is no
log-ratio of one sequence once the two models differ ("published" here); "shared" lets both score the policy's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from trl_vlm.data.encoding import encode
from trl_vlm.data.errors import RowError
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.models.families import IMAGE_INPUTS
from trl_vlm.models.prefix_sharing.sharing import SHARED_PREFIX
from trl_vlm.pairs.draws import Draws
from trl_vlm.pairs.noise import Overflow, distorted_images
from trl_vlm.trainers.dpo.collator import PreferenceBatch, PreferenceCollator, Row

# The batch key: `pixel_values` of the noisy images, once per row, and how many `rows` there are.
DISTORTED: Final = "distorted"


class DistortingCollator:
    """Appends the chosen replies to a batch of pairs once more, and adds the pixels of noisy images.

    Args:
        collate: Makes the batch, with one more rejected reply than the rows hold.
        processor: The model's.
        draws: The random numbers of the row of a name.
        steps: Of noise, see `trl_vlm.pairs.noise`.
        overflow: How colors out of range are treated.
    """

    def __init__(
        self,
        collate: PreferenceCollator,
        processor: ProcessorMixin,
        draws: Callable[[str], Draws],
        steps: int,
        overflow: Overflow,
    ):
        self.collate, self.processor, self.draws, self.steps = collate, processor, draws, steps
        self.overflow: Overflow = overflow

    @property
    def shares_prefix(self) -> bool:
        """Whether the model shares prefixes."""
        return self.collate.shares_prefix

    def __call__(self, rows: Sequence[Row]) -> PreferenceBatch:
        """The batch of `rows`, which are not changed."""
        rows = [self.collate.loaded(row, index) for index, row in enumerate(rows)]
        batch = self.collate(
            [{**row, "rejected_extra": [*(row.get("rejected_extra") or ()), row["chosen"]]} for row in rows]
        )
        noisy = encode(
            self.processor,
            [row["prompt"] for row in rows],
            [self._noisy(row) for row in rows],
            add_generation_prompt=True,
            names=[row[ROW_NAME] for row in rows],
            max_pixels=None,  # they are loaded already
        )
        batch[DISTORTED] = {"pixel_values": noisy["pixel_values"], "rows": len(rows)}
        return batch

    def _noisy(self, row: Row) -> list[Any]:
        if not row["images"]:
            raise RowError(
                f"{row[ROW_NAME]}: it has no image, and `povid_loss` puts noise on images. Drop rows without images, "
                "or unset `povid_loss`."
            )
        draws = self.draws(row[ROW_NAME])
        return distorted_images(row["images"], self.steps, draws, indexing="code", overflow=self.overflow)


class DistortedReplies:
    """Replaces the labels of the last P sequences by the most likely tokens under noisy images.

    Args:
        shared: The reference scores the policy's tokens, not its own.
    """

    def __init__(self, shared: bool):
        self.shared = shared
        self.tokens: Tensor | None = None

    def labels(self, model: PreTrainedModel, inputs: dict[str, Any], noisy: dict[str, Any]) -> Tensor:
        """Labels (N, T) for a forward with clean images.

        Args:
            model: Policy or reference.
            inputs: Of that forward, with `labels` (N, T): the first P sequences are the chosen replies, and so are
                the last.
            noisy: See `DISTORTED`; with `is_reference` for the reference, which comes after the policy.
        """
        labels, rows = inputs["labels"], noisy["rows"]
        is_reply = labels[:rows, 1:] != -100
        if not (self.shared and noisy.get("is_reference")):
            self.tokens = _likeliest(model, inputs, noisy, is_reply)
        last = labels[-rows:].clone()
        last[:, 1:][is_reply] = self.tokens
        return torch.cat([labels[:-rows], last])


@torch.no_grad()
def _likeliest(model: PreTrainedModel, inputs: dict[str, Any], noisy: dict[str, Any], is_reply: Tensor) -> Tensor:
    """The most likely token at each of the R reply tokens, (R,), given the chosen reply before it."""
    rows, shape = noisy["rows"], inputs["input_ids"].shape
    images_come_once = SHARED_PREFIX in inputs
    chosen = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == shape and name != "labels":
            chosen[name] = value[:rows]
        elif name in IMAGE_INPUTS:
            chosen[name] = value if images_come_once else value[: len(value) * rows // shape[0]]
    chosen["pixel_values"] = noisy["pixel_values"]
    states = model.base_model(**chosen, use_cache=False).last_hidden_state[:, :-1]
    # Transformations of logits in some families (scaling, soft caps) keep their order.
    head = model.get_output_embeddings()
    assert head is not None  # TRL trains models that generate
    return head(states[is_reply]).argmax(-1)
