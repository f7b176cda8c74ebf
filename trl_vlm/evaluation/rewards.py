"""Which reward model ranks which dataset: accuracy on held-out pairs, on all processes; resumable at any moment."""

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from trl_vlm.data.facts import JudgeTemplate
from trl_vlm.data.images import load_image
from trl_vlm.data.io.atomic import write_whole
from trl_vlm.data.messages import is_same_reply
from trl_vlm.data.rows import ROW_NAME
from trl_vlm.evaluation.benchmark import Ratio, Scores
from trl_vlm.evaluation.known_pairs import KnownPairs
from trl_vlm.evaluation.ledger import Ledger, claim
from trl_vlm.evaluation.metrics import Metric
from trl_vlm.evaluation.pair_numbers import decision_means, decision_metrics, decision_ratios, pair_counts
from trl_vlm.evaluation.results import Result, as_table, installed_versions, results_table, shown
from trl_vlm.evaluation.statistics import differences, intervals
from trl_vlm.evaluation.subjects import Subject, subjects_of
from trl_vlm.models.downloads import fetch_weights
from trl_vlm.models.place import Place, place_of
from trl_vlm.models.reward_model import check_reward_head
from trl_vlm.rewards.reward_model import RewardModelReward, load_template

FACTS, FACTS_LEFT_OUT, NO_FACTS = "with facts", "facts left out", "no facts"
HOW_TO_READ = (
    "Share of pairs whose chosen reply scores higher, in %; a tie is wrong. In brackets: the 95 % interval of a "
    "bootstrap over images. 50 is chance. Balanced by length: the mean of the accuracy where the chosen reply is "
    "longer, shorter and equally long, in words. Below 50, or far below the plain accuracy: the model has learned who "
    "wrote a reply, or how long it is. A difference whose interval holds 0 is called noise."
)


@dataclass(frozen=True)
class RewardModelSubject:
    """A reward model that is measured.

    Args:
        name: What tables call it.
        place: Where it lies.
    """

    name: str
    place: Place

    @property
    def subject(self) -> Subject:
        """Its folder of results, and its identity."""
        return Subject(self.name, self.place.path)

    def template(self) -> JudgeTemplate:
        """Its judge template, once the model is seen to be there with a head, as far as that can be told.

        Raises:
            ValueError: It is no reward model.
        """
        self.subject.check()
        check_reward_head(self.place.path)
        return load_template(self.place.path, **self.place.load_options)


@dataclass(frozen=True)
class RewardSettings:
    """How reward models are measured.

    Args:
        output: Folder for scores and tables; a run that was killed goes on there.
        batch_size: Pairs at once, on each process.
        dtype: Precision of the models.
        progress: Whether to show progress bars.
    """

    output: Path
    batch_size: int = 8
    dtype: str = "auto"
    progress: bool = True


def reward_models_of(texts: Sequence[str]) -> list[RewardModelSubject]:
    """The reward models of a command line: folders, or `owner/name[@revision][/folder]` on the hub.

    Raises:
        ValueError: One is not there, or is named twice.
    """
    names = [subject.name for subject in subjects_of(texts)]
    return [RewardModelSubject(name, place_of(text)) for name, text in zip(names, texts, strict=True)]


def evaluate_rewards(
    models: Sequence[RewardModelSubject], datasets: Sequence[KnownPairs], settings: RewardSettings
) -> list[Result]:
    """Measures reward models on datasets of preference pairs.

    Args:
        models: The models; the others are compared with the first.
        datasets: The pairs.
        settings: Where, and how.

    Returns:
        One result per dataset and model, on every process. `rewards.json` and `rewards.md` are in the output folder,
        with the scores of each pair in `<model>/<dataset>/`.

    Raises:
        ValueError: A model has no head or no template, two datasets share a name, or the output holds other scores.

    Source: 2407.02477, Table 7.
    Differs: intervals, ties, accuracy balanced by length, categories.
    """
    names = [pairs.name for pairs in datasets]
    if not models or not datasets or len(set(names)) < len(names):
        raise ValueError(
            f"there are {len(models)} models and the datasets {names}; needed: different ones, one at least."
        )
    templates = [model.template() for model in models]
    state = PartialState()
    for model in models:
        for pairs in datasets if state.is_main_process else ():
            claim(_folder(model, pairs, settings), _identity(model, pairs, settings))
    state.wait_for_everyone()
    for model in models:
        _score(model, datasets, settings)
    state.wait_for_everyone()
    results = [_result(model, pairs, settings, facts_form(template, pairs))
               for pairs in datasets for model, template in zip(models, templates, strict=True)]  # fmt: skip
    results = _compared(results, models, datasets, settings)
    if state.is_main_process:
        _write(results, datasets, settings)
    state.wait_for_everyone()
    return results


def facts_form(template: JudgeTemplate, pairs: KnownPairs) -> str:
    """Whether the model reads the facts of the rows: if it was trained to, and there are any."""
    if not pairs.has_facts:
        return NO_FACTS
    return FACTS if template.use_facts else FACTS_LEFT_OUT


def reward_scores(pairs: KnownPairs, scored: Sequence[tuple[float, float]]) -> Scores:
    """The numbers of a reward model on a dataset.

    Args:
        pairs: The dataset.
        scored: The scores of the chosen and of the rejected reply of each pair.
    """
    one = [1.0] * len(scored)
    right = [float(chosen > rejected) for chosen, rejected in scored]
    decided = [float(chosen != rejected) for chosen, rejected in scored]
    ratios = {
        **decision_ratios(right, decided, pairs.lengths, pairs.categories),
        "ties": Ratio([1 - each for each in decided], one),
        "margin": Ratio([chosen - rejected for chosen, rejected in scored], one),
    }
    return Scores(ratios, decision_means(ratios, pairs.categories), pair_counts(pairs.lengths, pairs.groups))


def reward_metrics(categories: Sequence[str]) -> tuple[Metric, ...]:
    """How tables show these numbers."""
    return (
        *decision_metrics(categories),
        Metric("ties", "ties", better="lower"),
        Metric("margin", "mean margin", is_share=False),
    )


def markdown_rewards(results: Sequence[Result], datasets: Sequence[KnownPairs]) -> str:
    """The matrix of accuracies, the same balanced by length, and a table for each dataset."""
    parts = ["# Reward models"]
    for key, title in (("accuracy", "Accuracy"), ("length_balanced", "Accuracy, balanced by length")):
        parts += [f"## {title} (%)", _matrix(results, datasets, Metric(key, title))]
    for pairs in datasets:
        columns = [result for result in results if result.task == pairs.name]
        forms = {result.prompt for result in columns}
        said = forms.pop() if len(forms) == 1 else "; ".join(f"{each.model}: {each.prompt}" for each in columns)
        about = f"{len(pairs)} pairs about {len(set(pairs.groups))} images, {said}"
        parts += [f"## {pairs.name}", about, results_table(columns, reward_metrics(pairs.categories))]
    return "\n\n".join([*parts, HOW_TO_READ]) + "\n"


def _matrix(results: Sequence[Result], datasets: Sequence[KnownPairs], metric: Metric) -> str:
    cells = {(result.model, result.task): shown(metric, result) for result in results}
    rows = [["reward model", *(pairs.name for pairs in datasets)]]
    for model in dict.fromkeys(result.model for result in results):
        rows.append([model, *(cells[model, pairs.name] for pairs in datasets)])
    return as_table(rows)


def _folder(model: RewardModelSubject, pairs: KnownPairs, settings: RewardSettings) -> Path:
    return settings.output / model.subject.folder / Subject(pairs.name).folder


def _identity(model: RewardModelSubject, pairs: KnownPairs, settings: RewardSettings) -> dict[str, Any]:
    about = {"dataset": pairs.name, "pairs": pairs.digest, "dtype": settings.dtype}
    return {**model.subject.identity(), **model.place.load_options, **about}


def _score(model: RewardModelSubject, datasets: Sequence[KnownPairs], settings: RewardSettings) -> None:
    """The scores of one model that are still missing, this process's share of them."""
    reward = None
    for pairs in datasets:
        ledger = Ledger(_folder(model, pairs, settings), "scores", PartialState().process_index)
        done = ledger.entries()
        # No process may add entries before all have seen what is there, or they would share out different batches.
        PartialState().wait_for_everyone()
        if len(done) < len(pairs):  # on every process
            fetch_weights({model.place.path: model.place.load_options})
        left = list(_left_batches(pairs, done, settings.batch_size))
        if not left:
            continue
        if reward is None:
            reward = RewardModelReward(model.place.path, batch_size=2 * settings.batch_size, dtype=settings.dtype,
                                       **model.place.load_options)  # fmt: skip
        hidden = not (settings.progress and PartialState().is_main_process)
        label = f"{model.name} on {pairs.name}"
        with tqdm(total=sum(map(len, left)), desc=label, unit="pair", disable=hidden or None) as bar:
            for batch in left:
                ledger.append(_batch_scores(reward, pairs, batch))
                bar.update(len(batch))
    del reward
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _left_batches(pairs: KnownPairs, done: dict[str, Any], batch_size: int) -> Iterator[list[int]]:
    """This process's batches, the longest first.

    A batch is done as a whole or not at all, and holds the same pairs whoever does it: padding moves the last bits of
    scores, so that neither a kill nor the number of processes may change it.
    """
    state = PartialState()
    ordered = sorted(range(len(pairs)), key=lambda number: (-max(pairs.lengths[number]), number))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    left = [batch for batch in batches if not all(str(number) in done for number in batch)]
    yield from left[state.process_index :: state.num_processes]


def _batch_scores(reward: RewardModelReward, pairs: KnownPairs, batch: Sequence[int]) -> list[dict[str, Any]]:
    """Entries of the ledger; of two equal replies one is scored."""
    rows = [pairs.row(number) for number in batch]
    for row in rows:  # decoded once for both replies
        row["images"] = [load_image(image, name=row[ROW_NAME]) for image in row["images"]]
    asked = [row for row in rows for _ in ("chosen", "rejected")]
    scores = reward(
        prompts=[row.get("prompt") or [] for row in asked],
        completions=[row[side] for row in rows for side in ("chosen", "rejected")],
        images=[row["images"] for row in asked],
        facts=[row.get("facts") for row in asked],
        row_name=[row[ROW_NAME] for row in asked],
    )
    entries = []
    for place, (number, row) in enumerate(zip(batch, rows, strict=True)):
        chosen, rejected = scores[2 * place : 2 * place + 2]
        if is_same_reply(row["chosen"], row["rejected"]):
            rejected = chosen
        entries.append({"id": str(number), "chosen": chosen, "rejected": rejected})
    return entries


def _scored(model: RewardModelSubject, pairs: KnownPairs, settings: RewardSettings) -> list[tuple[float, float]]:
    entries = Ledger(_folder(model, pairs, settings), "scores", 0).entries()
    return [(entries[str(number)]["chosen"], entries[str(number)]["rejected"]) for number in range(len(pairs))]


def _result(model: RewardModelSubject, pairs: KnownPairs, settings: RewardSettings, form: str) -> Result:
    scores = reward_scores(pairs, _scored(model, pairs, settings))
    return Result(
        model=model.name,
        task=pairs.name,
        prompt=form,
        judge=None,
        served=[],
        records=len(pairs),
        metrics=scores.metrics,
        intervals=intervals(scores, pairs.groups),
        versions=installed_versions(),
    )


def _compared(
    results: Sequence[Result],
    models: Sequence[RewardModelSubject],
    datasets: Sequence[KnownPairs],
    settings: RewardSettings,
) -> list[Result]:
    """The results with each model's differences from the first one, on the same pairs."""
    found = []
    places = [(pairs, model) for pairs in datasets for model in models]
    for result, (pairs, model) in zip(results, places, strict=True):
        if model is not models[0]:
            first, other = (reward_scores(pairs, _scored(each, pairs, settings)) for each in (models[0], model))
            result = replace(result, differences={models[0].name: differences(first, other, pairs.groups)})
        found.append(result)
    return found


def _write(results: Sequence[Result], datasets: Sequence[KnownPairs], settings: RewardSettings) -> None:
    about = [
        {"name": pairs.name, "pairs": len(pairs), "images": len(set(pairs.groups)), "digest": pairs.digest}
        for pairs in datasets
    ]
    data = {"datasets": about, "results": [result.as_json() for result in results]}
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(settings.output / "rewards.json", text + "\n")
    write_whole(settings.output / "rewards.md", markdown_rewards(results, datasets))
