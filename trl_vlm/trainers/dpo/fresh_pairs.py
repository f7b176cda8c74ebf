"""Fresh pairs for every step: a source makes them with the current policy, and TRL's collator makes the batches."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, overload

from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import DataCollator, ProcessorMixin, Trainer

from trl_vlm.data.faults import SCORE_WEIGHT_COLUMNS, SPAN_COLUMNS
from trl_vlm.data.named_rows import has_images, undecoded
from trl_vlm.data.rows import IMAGE_COLUMNS, PAIR_COLUMNS, REJECTED_IMAGES, ROW_NAME, Row
from trl_vlm.models.generation import Policy, SampledElsewhere, generating
from trl_vlm.pairs.source import PairSource, make_pairs
from trl_vlm.trainers import _trl
from trl_vlm.trainers.checks import refuse
from trl_vlm.trainers.dpo.collator import PreferenceBatch
from trl_vlm.trainers.dpo.config import DPOConfig
from trl_vlm.trainers.fsdp import whole_on_each_process
from trl_vlm.trainers.ppo.rollout_rows import check_rollout_rows
from trl_vlm.trainers.tables import PairTables
from trl_vlm.trainers.types import EvaluationRows, Model, Processor, Rows, base_model

if TYPE_CHECKING:
    from trl_vlm.trainers.dpo.trainer import DPOTrainer
    from trl_vlm.trainers.dpo.vllm import VLLMReplies

# Set in a batch without pairs: its loss is multiplied by zero.
WEIGHTLESS: Final = "weightless"
# The replies of a weightless batch.
NO_REPLY = [{"role": "assistant", "content": "-"}]

# The columns of a pair that a collator reads. TRL would take rows with other reply columns (`completion`) for another
# kind of data.
COLLATED_COLUMNS = (
    *("prompt", *PAIR_COLUMNS, "tools", "chat_template_kwargs", ROW_NAME),
    *(*IMAGE_COLUMNS, REJECTED_IMAGES),
)


# What a row says about its own two replies.
OF_REPLIES = (*SPAN_COLUMNS, *SCORE_WEIGHT_COLUMNS)


class Collator(Protocol):
    """Makes a batch of pairs."""

    def __call__(self, rows: list[dict[str, Any]], /) -> PreferenceBatch:
        """The batch of these rows."""
        ...


@contextmanager
def current_policy(trainer: Trainer) -> Iterator[Policy]:
    """A context with the trained model ready to generate: evaluation mode, adapters on, gathered, with a cache.

    ZeRO-3 and FSDP2 gather their parameters on every process, so all processes enter and leave this context together;
    in between they work independently. Afterwards the model's state is restored.
    """
    kwargs = trainer.args.gradient_checkpointing_kwargs
    policy_alone = getattr(trainer, "policy_alone", nullcontext)  # PPO's policy holds its critic
    with (
        policy_alone(),
        _trl.unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gradient_checkpointing_kwargs=kwargs
        ) as model,
        _trl.DistributedBackend(trainer.accelerator).summon_full_params(trainer.model_wrapped, recurse=False),
        whole_on_each_process(trainer.model_wrapped),
    ):
        # The layers of an adapter are inside the base model.
        model, processor = base_model(model), trainer.processing_class
        assert isinstance(processor, ProcessorMixin)  # rows with images come with one
        with generating(model), _unsynchronised(model), trainer.accelerator.autocast():
            yield Policy(model, processor)


@contextmanager
def sampling_policy(trainer: Trainer, engine: "VLLMReplies | None" = None) -> Iterator[Policy]:
    """As `current_policy`, with an engine for plain samples if there is one; it gets the weights first."""
    if engine is not None:
        engine.sync(trainer.state.global_step)
    with current_policy(trainer) as policy:
        yield policy if engine is None else SampledElsewhere(*policy, engine)


@contextmanager
def _unsynchronised(model: Any) -> Iterator[None]:
    """Lets `generate` run on one process alone: under ZeRO-3 and FSDP it would wait for the others to generate, too.

    Sources call it as often as their rows need, which differs from process to process.

    Args:
        model: `Any`, since no class of transformers says that its models have `generate`.
    """
    model.generate = partial(model.generate, synced_gpus=False)
    try:
        yield
    finally:
        del model.generate


def has_pair(row: Row) -> bool:
    """Whether a row has a chosen and a rejected reply of its own."""
    return bool(row.get("chosen") and row.get("rejected"))


def without_replies(row: Row) -> dict[str, Any]:
    """A row whose replies do not matter."""
    kept = {name: value for name, value in row.items() if name not in PAIR_COLUMNS}
    return kept | {"chosen": NO_REPLY, "rejected": NO_REPLY}


def made_pairs(
    source: PairSource, rows: Sequence[Row], policy: Policy, round: int, batch_size: int
) -> list[Row | None]:
    """The pairs that a source makes of rows, with only the columns that are trained on or logged.

    Spans of changed characters, and weights of scores, are dropped with the replies that they describe.

    Args:
        source: Makes the pairs.
        rows: Any number of rows.
        policy: As for the source.
        round: As for the source.
        batch_size: Rows that the source gets at once.

    Raises:
        ValueError: An entry is missing, or is no pair.
    """
    made = make_pairs(source, rows, policy, round, batch_size=batch_size)
    return [None if pair is None else _trimmed(pair, row, source) for pair, row in zip(made, rows, strict=True)]


def _trimmed(pair: Row, row: Row, source: PairSource) -> dict[str, Any]:
    for column in ("chosen", "rejected"):
        if not isinstance(pair.get(column), list | tuple) or not pair[column]:
            raise ValueError(
                f"{row.get(ROW_NAME, 'a row')}: the pair source {source!r} gave {pair.get(column)!r} as {column!r}. "
                "It must be a list of messages; for a row without a decision give None in place of the pair."
            )
    columns = [name for name in pair if name in COLLATED_COLUMNS or name.startswith("pair_")]
    is_new = any(pair[column] != row.get(column) for column in ("chosen", "rejected"))
    return {name: pair[name] for name in columns if not (is_new and name in OF_REPLIES)}


def pair_statistics(pairs: Sequence[Row]) -> dict[str, tuple[float, int]]:
    """Sum and count of every number in the columns `pair_<name>`, under the names of metrics, `pairs/<name>`."""
    sums: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for pair in pairs:
        for column, value in pair.items():
            if column.startswith("pair_") and isinstance(value, bool | int | float):
                name = f"pairs/{column.removeprefix('pair_')}"
                sums[name] += value
                counts[name] += 1
    return {name: (sums[name], counts[name]) for name in counts}


def total_statistics(statistics: Sequence[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """Means over the sums and counts of all processes."""
    names = {name: None for process in statistics for name in process}
    totals = {
        name: [sum(part) for part in zip(*(s[name] for s in statistics if name in s), strict=True)] for name in names
    }
    return {name: total / count for name, (total, count) in totals.items()}


def check_arguments(args: DPOConfig, processor: Processor, data_collator: DataCollator | None) -> None:
    """Refuses what cannot be combined with a source of pairs.

    Raises:
        TypeError: The model reads no images.
        ValueError: An option needs pairs that exist before training.
    """
    if not isinstance(processor, ProcessorMixin):
        raise TypeError(
            "`pair_source` needs a vision-language model and its processor: sources read rows with images. Pass such "
            "a model, or make the pairs before training (`trl-vlm pairs`)."
        )
    stored = "it holds the log-probabilities of replies that exist before training"
    refuse(
        "`pair_source`",
        {
            "`reference_cache`": (args.reference_cache is not None, stored),
            "`precompute_ref_log_probs`": (args.precompute_ref_log_probs, "the replies are new at every step"),
            "A data collator of your own": (data_collator is not None, "the pairs are made behind it"),
        },
    )


def refuse_virtual_tokens(model: Model) -> None:
    """Raises if an adapter puts virtual tokens before the prompt: sources read a model without its PEFT wrapper."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type
        raise ValueError(
            f"Pairs cannot be made with a {getattr(kind, 'value', kind)} adapter: its virtual tokens are "
            "not part of the model that generates. Use LoRA or another adapter inside the layers, or make the pairs "
            "before training (`trl-vlm pairs`)."
        )


def checked_data(
    train: Rows | None,
    evaluation: EvaluationRows | None,
    args: DPOConfig,
    processor: Processor,
    data_collator: DataCollator | None,
) -> tuple[Rows | None, EvaluationRows | None]:
    """The datasets of a trainer with a pair source, after checks of its options and rows."""
    check_arguments(args, processor, data_collator)
    args.remove_unused_columns = False  # a source may read any column
    return checked_rows(train, "train", processor), checked_rows(evaluation, "eval", processor)


@overload
def checked_rows(dataset: Rows | None, name: str, processor: Processor) -> Rows | None: ...
@overload
def checked_rows(dataset: EvaluationRows | None, name: str, processor: Processor) -> EvaluationRows | None: ...
def checked_rows(dataset: Any, name: str, processor: Processor) -> Any:
    """The dataset after a check of its rows, with a column `images` ([] in each row) if it has none.

    TRL tokenizes rows without such a column before training, when their replies do not exist yet.
    """
    if isinstance(dataset, dict):
        return {key: checked_rows(rows, key, processor) for key, rows in dataset.items()}
    check_rollout_rows(dataset, name, processor)
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    if has_images(dataset):
        return undecoded(dataset)
    return dataset.map(lambda _: {"images": []})


class MicroBatch(NamedTuple):
    """The rows of a micro-batch.

    step: Those of all micro-batches of its optimizer step, on this process.
    place: Which of them it is.
    """

    step: Sequence[Sequence[Row]]
    place: int


class _Made(NamedTuple):
    """What became of a micro-batch: the pairs that it trains on, or one of its rows if there is none."""

    pairs: Sequence[Row]
    extra: int
    row: Row


class FreshPairs:
    """Turns the rows of an optimizer step into batches of pairs, which a source makes with the current policy.

    All pairs of a step are made before its first micro-batch: the policy does not change in between, and a GPU that
    generates is as fast for many rows as for few. The round of the source is the number of the step, so that a row's
    pair depends neither on the size of micro-batches nor on the number of processes.

    Every process keeps the same number of pairs in a micro-batch, the minimum over all processes, since each averages
    over its own: otherwise pairs would weigh more on one process than on another. If one has none, all run a
    weightless batch, so that gradients are exchanged as in any other step.

    Logged: `pairs/undecided`, the share of rows for which the source had no decision; `pairs/left_out`, the share
    whose pair was left out because another process had fewer; `pairs/none`, the share of micro-batches without any
    pair; and the mean of each number that the source reports in a column `pair_*`.

    Args:
        trainer: Of the policy.
        source: Makes the pairs.
        make_collator: Returns a collator for a given number of further rejected replies per row.
        engine: Draws plain samples for the source; None: the policy does.
    """

    def __init__(
        self,
        trainer: "DPOTrainer",
        source: PairSource,
        make_collator: Callable[[int], Collator],
        engine: "VLLMReplies | None" = None,
    ):
        refuse_virtual_tokens(trainer.model)
        self.trainer, self.source, self.make_collator, self.engine = trainer, source, make_collator, engine
        self.tables: PairTables | None = None
        if trainer.args.log_pairs_steps is not None:
            self.tables = PairTables(trainer, trainer.args.log_pairs_steps)
            trainer.add_callback(self.tables)
        self.collators: dict[int, Collator] = {}
        self._step: Sequence[Sequence[Row]] = ()
        self._made: list[_Made] = []

    def batch(self, rows: Sequence[Row]) -> PreferenceBatch:
        """The batch of pairs for rows that are a step by themselves, or that are evaluated."""
        return self.micro_batch(MicroBatch([rows], 0))

    def micro_batch(self, micro_batch: MicroBatch) -> PreferenceBatch:
        """The batch of pairs for the rows of a micro-batch."""
        if micro_batch.step is not self._step:
            self._made, self._step = self._of_step(micro_batch.step), micro_batch.step
        pairs, extra, row = self._made[micro_batch.place]
        if self.tables is not None and self.trainer.model.training:
            self.tables.add(pairs)
        if not pairs:
            batch = self.collated([without_replies(row)])
            batch[WEIGHTLESS] = True
            return batch
        return self.collated(pairs, extra)

    def collated(self, pairs: Sequence[Row], extra: int = 0) -> PreferenceBatch:
        """The batch of these pairs, with `extra` further rejected replies each."""
        if extra not in self.collators:
            self.collators[extra] = self.make_collator(extra)
        return self.collators[extra](
            [{name: pair[name] for name in COLLATED_COLUMNS if name in pair} for pair in pairs]
        )

    def _of_step(self, step: Sequence[Sequence[Row]]) -> list[_Made]:
        """The pairs of all micro-batches of a step; all processes make theirs together."""
        made = self._pairs([row for rows in step for row in rows])
        stops = list(accumulate(map(len, step)))
        decided = [
            [pair for pair in made[stop - len(rows) : stop] if pair is not None]
            for rows, stop in zip(step, stops, strict=True)
        ]
        pairs = [pair for part in decided for pair in part]
        extras = sorted({len(pair.get("rejected_extra") or ()) for pair in pairs})
        counts = {"pairs": list(map(len, decided)), "rows": len(made), "extras": extras}
        everywhere = gather_object([counts | {"statistics": pair_statistics(pairs)}])
        kept = [min(counts) for counts in zip(*(process["pairs"] for process in everywhere), strict=True)]
        self._log(everywhere, kept)
        extra = self._extra(everywhere)
        return [_Made(part[:count], extra, rows[0]) for part, count, rows in zip(decided, kept, step, strict=True)]

    def _pairs(self, rows: Sequence[Row]) -> list[Row | None]:
        """The source's pairs while training; while evaluating, the rows' own, where all processes' rows have them."""
        is_training = self.trainer.model.training
        if not is_training and all(gather_object([all(map(has_pair, rows))])):
            return list(rows)
        # The number of the step is that of a resumed run, too.
        round = self.trainer.state.global_step if is_training else 0
        with sampling_policy(self.trainer, self.engine) as policy:
            return made_pairs(self.source, rows, policy, round, self.trainer.args.pair_batch_size)

    @staticmethod
    def _extra(everywhere: Sequence[dict[str, Any]]) -> int:
        numbers = sorted({number for process in everywhere for number in process["extras"]})
        if len(numbers) > 1:
            raise ValueError(
                f"The pairs of one step have different numbers of `rejected_extra`: {numbers}. Every pair needs the "
                "same number: use one source that always adds as many (`CombinedRejected`), not a mixture."
            )
        return numbers[0] if numbers else 0

    def _log(self, everywhere: Sequence[dict[str, Any]], kept: Sequence[int]) -> None:
        rows = sum(process["rows"] for process in everywhere)
        pairs = sum(sum(process["pairs"]) for process in everywhere)
        measured = {
            "pairs/undecided": 1 - pairs / rows,
            "pairs/left_out": (pairs - sum(kept) * len(everywhere)) / rows,
            "pairs/none": kept.count(0) / len(kept),
            **total_statistics([process["statistics"] for process in everywhere]),
        }
        metrics = self.trainer._metrics["train" if self.trainer.model.training else "eval"]
        for name, value in measured.items():
            metrics[name].append(value)
