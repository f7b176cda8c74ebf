"""How good a judge is: its accuracy on pairs with known answers, and what it costs; resumable at any moment."""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from trl_vlm.data.io.atomic import write_whole
from trl_vlm.data.rows import ALL_REPLY_COLUMNS
from trl_vlm.evaluation.benchmark import Ratio, Scores
from trl_vlm.evaluation.known_pairs import KnownPairs, last_text
from trl_vlm.evaluation.ledger import Ledger, claim
from trl_vlm.evaluation.metrics import Metric
from trl_vlm.evaluation.pair_numbers import decision_means, decision_metrics, decision_ratios, pair_counts
from trl_vlm.evaluation.results import Result, installed_versions, results_table
from trl_vlm.evaluation.scoring import JudgeName
from trl_vlm.evaluation.statistics import intervals
from trl_vlm.evaluation.subjects import Subject
from trl_vlm.judges.chat import CUT_OFF, EMPTY
from trl_vlm.judges.claims import AS_MANY, NO_LIST, UNDECIDED
from trl_vlm.judges.judge import Comparison, Judge, Verdict
from trl_vlm.judges.pairwise import EQUAL, NEITHER, NO_VERDICT, ORDER
from trl_vlm.judges.reward import EQUAL_REWARDS, NO_REWARD
from trl_vlm.judges.spending import spending_of
from trl_vlm.models.downloads import fetch_weights

ASKED_AT_ONCE = 64  # comparisons between saves
CHOSEN, REJECTED = "chosen", "rejected"
# Why there is no decision -> what results call it; every other reason is a failure to get an answer.
REASONS = {
    ORDER: "order_flips",
    NEITHER: "neither",
    EQUAL: "neither",
    EQUAL_REWARDS: "neither",
    NO_REWARD: "neither",
    AS_MANY: "neither",
    NO_VERDICT: "unparsed",
    NO_LIST: "unparsed",
    UNDECIDED: "unparsed",
    CUT_OFF: "cut_off",
    EMPTY: "unparsed",
}
FAILED = "no_answer"
# Answers that asking again would not change.
FINAL = (ORDER, NEITHER, EQUAL, EQUAL_REWARDS, NO_REWARD, AS_MANY, NO_VERDICT, NO_LIST)
METRICS = (
    Metric("accuracy_decided", "accuracy over decided pairs", better="higher"),
    Metric("undecided", "undecided", better="lower"),
    Metric("order_flips", "undecided: the order decides", better="lower"),
    Metric("neither", "undecided: neither is better"),
    Metric("unparsed", "undecided: unparsed answers", better="lower"),
    Metric("cut_off", "undecided: cut off at the longest answer", better="lower"),
    Metric(FAILED, "undecided: no answer", better="lower"),
    Metric("requests", "requests sent", is_share=False),
    Metric("from_cache", "answers from the cache", is_share=False),
    Metric("prompt_tokens", "tokens of requests", is_share=False),
    Metric("completion_tokens", "tokens of answers", is_share=False),
)
HOW_TO_READ = (
    "Share of pairs of which the judge prefers the chosen reply, in %; an undecided pair is not right. In brackets: "
    "the 95 % interval of a bootstrap over images. A judge that is asked both orders and contradicts itself is "
    "undecided. Costs are those of all runs into this folder; an endpoint counts its tokens itself."
)


@dataclass(frozen=True)
class PairJudge:
    """A judge that compares two replies, made when it is needed.

    Args:
        name: Who judges, and the digest of what it is asked: what results say.
        make: Makes it.
        both_orders: Whether both orders of the replies are asked.
        local_models: What `make` loads on each process, downloaded once per node before.
    """

    name: JudgeName
    make: Callable[[], Judge]
    both_orders: bool = True
    local_models: Sequence[str] = ()


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge is measured.

    Args:
        output: Folder for verdicts and tables; a run that was killed goes on there.
        progress: Whether to show progress bars.
    """

    output: Path
    progress: bool = True


def evaluate_judge(judge: PairJudge, datasets: Sequence[KnownPairs], settings: JudgeSettings) -> list[Result]:
    """Measures a judge on datasets of preference pairs; what it failed to answer in an earlier run is asked again.

    Args:
        judge: The judge.
        datasets: The pairs.
        settings: Where, and how.

    Returns:
        One result per dataset, on every process. `judges.json` and `judges.md` in the output folder hold them beside
        those of other judges; the verdicts are in `<judge>/<dataset>/`.

    Raises:
        ValueError: The judge answers under several names, or the output holds verdicts about other pairs.
        SpendingCapReached: The endpoint was asked as often as it may be. Earlier verdicts are kept.

    Source: 2407.02477 reports the accuracy of its annotators on three datasets.
    Differs: both orders are asked, and undecided pairs are counted.
    """
    state = PartialState()
    for pairs in datasets if state.is_main_process else ():
        about = {"dataset": pairs.name, "pairs": pairs.digest, "judge": list(judge.name)}
        claim(_folder(judge, pairs, settings), about)
    state.wait_for_everyone()
    made: list[Judge] = []
    for pairs in datasets:
        _ask(judge, made, pairs, settings)
    state.wait_for_everyone()
    results = [_result(judge, pairs, settings) for pairs in datasets]
    if state.is_main_process:
        _write(results, datasets, settings)
    state.wait_for_everyone()
    return results


def judge_scores(
    pairs: KnownPairs, verdicts: Sequence[Mapping[str, Any]], costs: Mapping[str, int], *, both_orders: bool = True
) -> Scores:
    """The numbers of a judge on a dataset.

    Args:
        pairs: The dataset.
        verdicts: For each pair `preferred` ("chosen", "rejected" or None) and `reason`, why there is no decision.
        costs: Requests, answers from the cache, tokens.
        both_orders: Whether both orders were asked, so that a contradiction can be seen.
    """
    one = [1.0] * len(verdicts)
    right = [float(verdict["preferred"] == CHOSEN) for verdict in verdicts]
    decided = [float(verdict["preferred"] is not None) for verdict in verdicts]
    kinds = [_kind(verdict) for verdict in verdicts]
    ratios = {
        **decision_ratios(right, decided, pairs.lengths, pairs.categories),
        "accuracy_decided": Ratio(right, decided),
        "undecided": Ratio([1 - each for each in decided], one),
    }
    for name in dict.fromkeys([*REASONS.values(), FAILED]):
        if both_orders or name != "order_flips":
            ratios[name] = Ratio([float(kind == name) for kind in kinds], one)
    counts = pair_counts(pairs.lengths, pairs.groups) | {name: float(count) for name, count in costs.items()}
    return Scores(ratios, decision_means(ratios, pairs.categories), counts)


def markdown_judges(results: Sequence[Result], categories: Mapping[str, Sequence[str]]) -> str:
    """A table for each dataset, with a column for each judge.

    Args:
        results: Of any judges; those about other pairs of the same name have a table of their own.
        categories: The categories of the pairs of each dataset.
    """
    parts = ["# Judges"]
    for task, digest in dict.fromkeys((result.task, result.prompt) for result in results):
        columns = [result for result in results if (result.task, result.prompt) == (task, digest)]
        metrics = decision_metrics(categories.get(task, ()))
        parts += [f"## {task}", f"{columns[0].records} pairs, digest {digest}"]
        parts.append(results_table(columns, (metrics[0], *METRICS[:7], *metrics[1:], *METRICS[7:])))
    return "\n\n".join([*parts, HOW_TO_READ]) + "\n"


def _kind(verdict: Mapping[str, Any]) -> str:
    return "" if verdict["preferred"] is not None else REASONS.get(verdict["reason"], FAILED)


def _is_final(entry: Mapping[str, Any]) -> bool:
    return entry["preferred"] is not None or entry["reason"] in FINAL


def _folder(judge: PairJudge, pairs: KnownPairs, settings: JudgeSettings) -> Path:
    return settings.output / judge.name.folder / Subject(pairs.name).folder


def _ask(judge: PairJudge, made: list[Judge], pairs: KnownPairs, settings: JudgeSettings) -> None:
    """The verdicts that are still missing, this process's share of them; the judge is made once, if at all."""
    state, folder = PartialState(), _folder(judge, pairs, settings)
    ledger = Ledger(folder, "verdicts", state.process_index)
    costs = Ledger(folder, "costs", state.process_index)
    done = {name for name, entry in ledger.entries(_is_final).items() if _is_final(entry)}
    state.wait_for_everyone()  # none may add entries before all have seen what is there
    left = [number for number in range(len(pairs)) if str(number) not in done]
    mine = left[state.process_index :: state.num_processes]
    if left:  # on every process
        fetch_weights({name: {} for name in judge.local_models})
    if mine and not made:
        made.append(judge.make())
    hidden = not (settings.progress and state.is_main_process)
    with tqdm(total=len(mine), desc=f"judge on {pairs.name}", unit="pair", disable=hidden or None) as bar:
        for start in range(0, len(mine), ASKED_AT_ONCE):
            block = mine[start : start + ASKED_AT_ONCE]
            chat = getattr(made[0], "chat", None)
            before = _costs(chat)
            try:
                comparisons = [_comparison(pairs, number) for number in block]
                verdicts = made[0].prefer([comparison for comparison, _ in comparisons])
            finally:  # what was paid for is counted, whatever came of it
                spent = _costs(chat) - before
                if spent:
                    costs.append([{"id": uuid.uuid4().hex, **spent}])
            served = sorted(getattr(chat, "served", ()))
            ledger.append(
                _entry(number, verdict, is_swapped, served)
                for number, (_, is_swapped), verdict in zip(block, comparisons, verdicts, strict=True)
            )
            check_served(served, folder)
            if so_far := spending_of(chat):
                bar.set_postfix_str(str(so_far))
            bar.update(len(block))


def _comparison(pairs: KnownPairs, number: int) -> tuple[Comparison, bool]:
    """The two replies in an order that says nothing, and whether the rejected one is the first.

    The row holds neither, so that a judge which is shown the ground truth is not shown the answer.
    """
    row = pairs.row(number)
    replies = last_text(row[CHOSEN]).strip(), last_text(row[REJECTED]).strip()
    is_swapped = _digest(replies[1]) < _digest(replies[0])
    about = {name: value for name, value in row.items() if name not in ALL_REPLY_COLUMNS}
    first, second = replies[::-1] if is_swapped else replies
    return Comparison(about, first, second), is_swapped


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()


def _entry(number: int, verdict: Verdict, is_swapped: bool, served: Sequence[str]) -> dict[str, Any]:
    preferred = None
    if verdict.preferred is not None:
        preferred = REJECTED if (verdict.preferred == 0) == is_swapped else CHOSEN
    entry = {"id": str(number), "preferred": preferred, "reason": verdict.reason}
    return {**entry, "text": verdict.text, "served": list(served)}


def _costs(chat: object) -> Counter[str]:
    """What a chat has spent since it was made; nothing of one on this machine."""
    tokens = getattr(chat, "tokens", {})
    spent = {"requests": getattr(chat, "requests_sent", 0), "from_cache": getattr(chat, "answers_from_cache", 0)}
    return Counter({**spent, **{f"{kind}_tokens": count for kind, count in tokens.items()}})


def check_served(served: Iterable[str], folder: Path, who: str = "the judge") -> None:
    """Refuses answers under several names: they are those of several models.

    Raises:
        ValueError: There are several.
    """
    names = sorted(set(served))
    if len(names) > 1:
        raise ValueError(
            f"{who} called itself {' and '.join(map(repr, names))}: the answers are those of several models. "
            f"Delete {str(folder)!r} and ask one of them."
        )


def _result(judge: PairJudge, pairs: KnownPairs, settings: JudgeSettings) -> Result:
    folder = _folder(judge, pairs, settings)
    entries = Ledger(folder, "verdicts", 0).entries(_is_final)
    verdicts = [entries[str(number)] for number in range(len(pairs))]
    served = sorted({name for entry in verdicts for name in entry["served"]})
    check_served(served, folder)
    costs: Counter[str] = Counter()
    for entry in Ledger(folder, "costs", 0).entries().values():
        costs.update({name: count for name, count in entry.items() if name != "id"})
    scores = judge_scores(pairs, verdicts, costs, both_orders=judge.both_orders)
    return Result(
        model=str(judge.name),
        task=pairs.name,
        prompt=pairs.digest,
        judge=judge.name,
        served=served,
        records=len(pairs),
        metrics=scores.metrics,
        intervals=intervals(scores, pairs.groups),
        versions=installed_versions(),
    )


def _write(results: Sequence[Result], datasets: Sequence[KnownPairs], settings: JudgeSettings) -> None:
    """Writes the results beside those of other judges."""
    file = settings.output / "judges.json"
    kept: list[Result] = []
    if file.is_file():
        kept = [Result.from_json(entry) for entry in json.loads(file.read_text(encoding="utf-8"))["results"]]
    new = {result.key for result in results}
    everything = [result for result in kept if result.key not in new] + list(results)
    data = {"results": [result.as_json() for result in everything]}
    write_whole(file, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    categories = {pairs.name: pairs.categories for pairs in datasets}
    write_whole(settings.output / "judges.md", markdown_judges(everything, categories))
