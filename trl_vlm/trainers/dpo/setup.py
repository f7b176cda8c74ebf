"""What `DPOTrainer` prepares that other trainers do not: its datasets, its reference, its shared prefixes."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn

from trl_vlm.data.messages import message_text
from trl_vlm.models.prefix_sharing.sharing import why_not_shareable
from trl_vlm.trainers import preparation
from trl_vlm.trainers.dpo.collator import row_name
from trl_vlm.trainers.dpo.config import DPOConfig

logger = logging.getLogger(__name__)


class DPOSetup(Protocol):
    """What decides on shared prefixes, of a trainer that TRL's constructor has made."""

    args: DPOConfig
    model: nn.Module
    compute_metrics: Callable[..., dict] | None
    aux_loss_enabled: bool


def why_no_shared_prefix(trainer: DPOSetup, models: list[nn.Module], own_collator: bool) -> str | None:
    """Why a `DPOTrainer` computes prompts once per reply, as one sentence; None if its models can share them."""
    args = trainer.args
    further = {
        "`compute_metrics` reads logits of whole sequences": trainer.compute_metrics is not None,
        "the auxiliary loss of mixtures of experts counts every token": trainer.aux_loss_enabled,
        "`keep_end` truncation gives the replies of a row different prompts": (
            args.truncation_mode == "keep_end" and args.max_length is not None
        ),
    }
    reason = preparation.why_no_shared_prefix(trainer.model, args, own_collator, further)
    return reason or next(filter(None, (why_not_shareable(model.config) for model in models)), None)


def refuse_unknown_reference(
    model: str | nn.Module, ref_model: nn.Module | None, peft_config: PeftConfig | None, args: DPOConfig
) -> None:
    """Stop where TRL would load the reference from the path of a model that was made in memory and has none.

    Raises:
        ValueError: The model has no path, and its reference is neither passed, nor its own base, nor computed before.
    """
    needs_path = ref_model is None and peft_config is None and not args.precompute_ref_log_probs
    if isinstance(model, str) or is_peft_model(model) or model.config._name_or_path or not needs_path:
        return
    raise ValueError(
        f"The model is a {type(model).__name__} that was made in memory, so its reference cannot be loaded. Pass "
        "`ref_model=copy.deepcopy(model)`, or save the model with its processor and pass the folder, or train an "
        "adapter (`peft_config`), whose base is the reference."
    )


def extra_replies(dataset: Any) -> int:
    """How many replies `rejected_extra` holds in the first row of a dataset; 0 without the column."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return 0
    row = next(iter(dataset), None)
    return len((row or {}).get("rejected_extra") or ())


def checked_pairs(dataset: Any, name: str, bad_pairs: str) -> Any:
    """The dataset, after a look at every pair: empty replies are an error or left out, identical ones reported.

    Raises:
        ValueError: a reply is empty, and `bad_pairs` is "error"; the message names the row.
    """
    if isinstance(dataset, dict):
        return type(dataset)(
            {key: checked_pairs(value, f"{name}[{key}]", bad_pairs) for key, value in dataset.items()}
        )
    if not isinstance(dataset, Dataset) or not {"chosen", "rejected"} <= set(dataset.column_names):
        return dataset
    columns = [column for column in ("prompt", "chosen", "rejected") if column in dataset.column_names]
    empty, identical = _bad_rows(dataset.select_columns(columns))
    if empty and bad_pairs == "error":
        row = empty[0]
        raise ValueError(
            f"Row {row} of {name} ({row_name(dataset.select_columns(columns)[row])}) has an empty reply; so have "
            f"{len(empty)} of {len(dataset)} rows. Remove them, or set `bad_pairs='skip'` to leave them out."
        )
    if bad_pairs == "skip" and (empty or identical):
        leave_out = {*empty, *identical}
        logger.warning(
            "Left out %d of %d rows of %s: %d with an empty reply, %d whose replies are identical.",
            *(len(leave_out), len(dataset), name, len(empty), len(identical)),
        )
        return dataset.select([row for row in range(len(dataset)) if row not in leave_out])
    if identical:
        logger.warning(
            "%d of %d rows of %s have identical replies and add nothing to a preference loss. "
            "`bad_pairs='skip'` leaves them out.",
            *(len(identical), len(dataset), name),
        )
    return dataset


def _bad_rows(dataset: Dataset) -> tuple[list[int], list[int]]:
    """Indices of the rows with an empty reply, and of those with two identical ones."""
    empty, identical = [], []
    for index, row in enumerate(dataset):
        chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
        if not chosen.strip() or not rejected.strip():
            empty.append(index)
        elif chosen == rejected:
            identical.append(index)
    return empty, identical


def _text(reply: Any) -> str:
    if isinstance(reply, str):
        return reply
    if any(message.get("tool_calls") for message in reply):
        return str(reply)
    return "".join(message_text(message) for message in reply if message["role"] == "assistant")


def prepared_extras(dataset: Any, prepared: Any, prepare: Callable[[Any], Any], extra: int, name: str) -> Any:
    """TRL's tokenised rows with `rejected_extra_ids`: TRL tokenises each extra reply in the place of `rejected`.

    Args:
        dataset: the rows as the user gave them.
        prepared: what TRL made of them.
        prepare: TRL's preparation.
        extra: how many replies `rejected_extra` holds.
        name: what the dataset is called in errors.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{name}: `rejected_extra` of text rows needs a dataset with rows by index, not a stream.")
    if "rejected_extra" not in dataset.column_names:
        raise ValueError(
            f"{name}: the column `rejected_extra` is missing, and the training data have it. Add it, or drop it there."
        )
    columns: list[list[list[int]]] = []
    for number in range(extra):
        one = prepare(dataset.map(_ExtraAsRejected(number)))
        if one["prompt_ids"][:] != prepared["prompt_ids"][:]:
            raise ValueError(
                f"{name}: the chat template renders a prompt in two ways, depending on the reply, or `max_length` "
                "drops other rows for the extra replies. Use another template, or raise `max_length`."
            )
        columns.append(one["rejected_ids"][:])
    return prepared.add_column("rejected_extra_ids", [list(replies) for replies in zip(*columns, strict=True)])


class _ExtraAsRejected:
    """Puts an extra reply in the place of the rejected one."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"rejected": row["rejected_extra"][self.number]}
