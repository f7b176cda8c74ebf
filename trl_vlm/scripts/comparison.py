"""The end of a tutorial or a study: models that started from one are compared, and a person can read how."""

from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState

from trl_vlm.data.io.atomic import write_whole
from trl_vlm.evaluation import Arm, RunSettings, Subject, write_report, write_results
from trl_vlm.evaluation.objects.finder import ObjectFinder
from trl_vlm.evaluation.results import Result
from trl_vlm.evaluation.run import make_replies
from trl_vlm.evaluation.summary import Comparison, Evaluation, compare_models, summary
from trl_vlm.look.inputs import LookSettings, look
from trl_vlm.scripts.run_folder import HISTORY, history


def compare(
    models: Mapping[str, str],
    evaluation: Evaluation,
    folder: Path,
    *,
    title: str,
    notes: list[str],
    batch_size: int = 8,
) -> str:
    """Measures models, and writes a summary, a report, and a page with the replies side by side.

    Args:
        models: Name to folder or hub id: the one that the others started from, the trained one that the summary is
            about, and perhaps one that it is compared with.
        evaluation: What they are measured on.
        folder: Gets `evaluation/`, with all replies and numbers, and `report/`.
        title: Heading of report and page.
        notes: What a report says of the models.
        batch_size: Replies per call of `generate`.

    Returns:
        Three sentences, a table, and where the page is. `report/summary.txt` holds them, too.
    """
    names, settings = list(models), _settings(evaluation, folder, batch_size)
    subjects = [Subject(name, models[name]) for name in names]
    results = compare_models([*subjects[1:], subjects[0]], evaluation.benchmarks, settings)
    comparison = Comparison(results, names[0], names[1], names[2] if len(names) > 2 else "", evaluation.groups)
    text = summary(comparison, about=evaluation.about)
    if PartialState().is_main_process:
        write_results(settings.output, results, evaluation.benchmarks)
        arms = [Arm(name, _by_group(results, name, comparison), history(models[name])) for name in names]
        write_report(folder / "report", arms, title=title, notes=notes)
        page = _page(subjects[:2], models, evaluation, folder, title)
        text += f"\nReplies before and after, side by side: {page}\n"
        write_whole(folder / "report" / "summary.txt", text)
    return text


def reply(models: Mapping[str, str], evaluation: Evaluation, folder: Path, *, batch_size: int = 8) -> None:
    """Makes replies that `compare` would make, perhaps while another process makes those of other models.

    Args:
        models: Name to folder or hub id, as in `compare`.
        evaluation: What they are measured on.
        folder: Gets `evaluation/`.
        batch_size: Replies per call of `generate`.
    """
    subjects = [Subject(name, path) for name, path in models.items()]
    make_replies(subjects, evaluation.benchmarks, _settings(evaluation, folder, batch_size))


def _settings(evaluation: Evaluation, folder: Path, batch_size: int) -> RunSettings:
    return RunSettings(evaluation.data, folder / "evaluation", batch_size=batch_size)


def _by_group(results: list[Result], model: str, comparison: Comparison) -> dict[str, dict[str, float]]:
    """A model's numbers as a report takes them."""
    splits: dict[str, dict[str, float]] = {}
    for group in comparison.groups:
        for result in results:
            if (result.model, result.task) == (model, group.task):
                values = {
                    key.removeprefix(group.prefix): value
                    for key, value in result.metrics.items()
                    if key.startswith(group.prefix)
                }
                splits.setdefault(group.title, {}).update(values)
    return splits


def _page(shown: list[Subject], models: Mapping[str, str], evaluation: Evaluation, folder: Path, title: str) -> Path:
    places = [str(folder / "evaluation" / subject.folder) for subject in shown]
    places += [path for path in models.values() if Path(path, HISTORY).is_file()]
    settings = LookSettings(images=evaluation.images, finder=evaluation.finder or ObjectFinder(), title=title)
    return look(places, folder / "report" / "page.html", settings)
