"""`trl-vlm evaluate judges`: a judge on pairs with known answers, and on published responses with published scores."""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from trl_vlm.cli.evaluate import data_of, judge_source, revision_of
from trl_vlm.cli.evaluate_rewards import add_pairs, output_of, pairs_of
from trl_vlm.cli.options import CommandFailed, join_processes, write
from trl_vlm.cli.parsing import CommandParser, add_fields, made_of
from trl_vlm.judges.options import JudgeOptions, kind_of

if TYPE_CHECKING:
    from trl_vlm.evaluation.judges import PairJudge


def add(command: CommandParser) -> None:
    """Adds the options of `trl-vlm evaluate judges`."""
    add_pairs(command, required=False)
    command.add_argument("--responses", help="file or folder of published responses, a file for each model")
    command.add_argument("--published", metavar="FILE", help="their scores: a JSON object, name of the file -> score")
    command.add_argument("--task", default="mmhal", help="benchmark that scores them (default: %(default)s)")
    command.add_argument("--data", default=".", help="folder of the benchmark's files (default: %(default)s)")
    add_fields(command, JudgeOptions)


def run(options: argparse.Namespace) -> int:
    """Measures, and reports."""
    from accelerate import PartialState

    from trl_vlm.judges.endpoint import SpendingCapReached

    if not options.datasets and not options.responses:
        raise ValueError(
            "nothing is given to judge: pass pairs with known answers (`--datasets`) or responses (`--responses`)."
        )
    join_processes()
    try:
        if options.datasets:
            _judge_pairs(options)
        if options.responses:
            _judge_responses(options)
    except SpendingCapReached as error:
        raise CommandFailed(str(error)) from error
    PartialState().destroy_process_group()
    return 0


def _judge_pairs(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from trl_vlm.evaluation.judges import HOW_TO_READ, JudgeSettings, evaluate_judge, markdown_judges

    judge = pair_judge(options)
    datasets = pairs_of(options)
    with output_of(options) as output:
        results = evaluate_judge(judge, datasets, JudgeSettings(output))
    if not PartialState().is_main_process:
        return
    if options.json:
        write(json.dumps([result.as_json() for result in results], indent=2, ensure_ascii=False))
        return
    categories = {pairs.name: pairs.categories for pairs in datasets}
    write(markdown_judges(results, categories).removesuffix("\n\n" + HOW_TO_READ + "\n"))
    if options.output:
        write(f"written: {output / 'judges.md'}, judges.json, and the verdicts beside them")


def _judge_responses(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from trl_vlm.evaluation.benchmarks import find_benchmark
    from trl_vlm.evaluation.published import (
        evaluate_published,
        markdown_agreement,
        published_scores,
        responses_of,
    )
    from trl_vlm.evaluation.run import RunSettings

    if options.judge_model is None:
        raise ValueError("published responses are scored by a model: set `--judge-model`.")
    benchmark, subjects = find_benchmark(options.task), responses_of(Path(options.responses))
    scores = None
    if options.published:
        scores = published_scores(Path(options.published), [subject.name for subject in subjects])
    with output_of(options) as output:
        settings = RunSettings(data_of(options), output, judge=judge_source(options), limit=options.limit)
        found = evaluate_published(subjects, benchmark, settings, scores)
    if PartialState().is_main_process:
        write(json.dumps(found.as_json(), indent=2) if options.json else markdown_agreement(found))


def pair_judge(options: argparse.Namespace) -> "PairJudge":
    """The judge that the options describe, once it has been seen to be there."""
    from trl_vlm.evaluation.judges import PairJudge
    from trl_vlm.evaluation.scoring import JudgeName
    from trl_vlm.judges.claims import claim_form
    from trl_vlm.judges.pairwise import pairwise_form
    from trl_vlm.models.place import place_of
    from trl_vlm.models.reward_model import check_reward_head
    from trl_vlm.rewards.reward_model import load_template

    chosen = made_of(JudgeOptions, options)
    kind = kind_of(chosen)
    server = chosen.server()
    if kind == "reward" and server is not None:
        about = server.served()  # refuses an address where none answers
        form = _form(about["template"], chosen.min_gap)
        return PairJudge(JudgeName(about["model"], about["revision"] or "", form), chosen.make, both_orders=False)
    if kind == "reward" and chosen.reward_model is not None:
        place_of(chosen.reward_model)  # refuses what is not there
        check_reward_head(chosen.reward_model)
        form = _form(asdict(load_template(chosen.reward_model)), chosen.min_gap)
        name = JudgeName(chosen.reward_model, revision_of(chosen.reward_model), form)
        return PairJudge(name, chosen.make, both_orders=False, local_models=chosen.local_models())
    if chosen.judge_model is None:
        raise ValueError(f"the judge {kind!r} needs a model. Set `--judge-model`.")
    both_orders = chosen.both_orders and kind != "claims"
    form = pairwise_form(both_orders=both_orders, show_ground_truth=chosen.show_ground_truth)
    if kind == "claims":
        form = claim_form(writer=chosen.claim_writer, threshold=chosen.claim_threshold, min_gap=chosen.min_gap)
    source = judge_source(options)  # asks an endpoint whether it is there
    name = JudgeName(source.name, source.revision, form)
    return PairJudge(name, chosen.make, both_orders=both_orders, local_models=chosen.local_models())


def _form(template: object, min_gap: float) -> str:
    """The digest of what a reward model reads beside the pairs."""
    return hashlib.sha256(json.dumps([template, min_gap], sort_keys=True).encode()).hexdigest()[:12]
