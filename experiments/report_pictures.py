"""The pictures of a comparison: those drawn of its figures, and those that the runs have of their own."""

from pathlib import Path

from bert_finetune.footprint import Footprint
from experiments.comparison import TEACHER, Comparison, Summary, label
from experiments.finished_runs import FinishedRun
from experiments.model_footprints import Footprints
from experiments.report import Picture
from experiments.score_pictures import (
    MOST_CURVES,
    Speed,
    draw_accuracy_against_latency,
    draw_dev_scores,
    draw_forest,
    draw_methods,
)


def draw_pictures(
    runs: list[FinishedRun], comparison: Comparison, footprints: Footprints, folder: Path
) -> list[Picture]:
    """Into `folder`, for each figure: every method's score and its difference to the baseline; the dev score over
    training, of a few methods; and the score against the time for a sentence where students of several sizes were
    measured, or some that are exported. PNG and SVG.
    """
    pictures = []
    for figure in comparison.figures:
        name = figure.title.lower().replace(" ", "-").replace("ρ", "rho")
        summaries = [summary for summary in comparison.summaries if summary.figure == figure]
        students = [summary for summary in summaries if summary.method != TEACHER]
        if students:
            compared = {s.name: s.mean for s in summaries if s.method in (TEACHER, comparison.baseline)}
            draw_methods(students, compared, folder / f"{name}-methods")
            pictures.append(Picture(folder / f"{name}-methods.svg", f"{figure.title}: every method's score"))
        differences = [summary for summary in students if summary.difference is not None]
        if differences:
            draw_forest(differences, folder / f"{name}-differences")
            pictures.append(Picture(folder / f"{name}-differences.svg", f"{figure.title}: against the baseline"))
        methods: dict[str, list[FinishedRun]] = {}
        for run in runs:
            if run.method != TEACHER and run.task.name == figure.task.name:
                methods.setdefault(label(run.size, run.method), []).append(run)
        lines = {
            method: [run.folder for run in of_it]
            for method, of_it in methods.items()
            if set.intersection(*(run.evaluations(figure) for run in of_it))
        }
        if 0 < len(lines) <= MOST_CURVES:
            draw_dev_scores(lines, folder / f"{name}-training", figure.key.removeprefix("eval_"))
            pictures.append(Picture(folder / f"{name}-training.svg", f"{figure.title}: dev score over training"))
        models = [
            Speed(summary.name, footprint.milliseconds, summary.mean / 100, *_in_int8(summary, footprint, runs))
            for summary in summaries
            if (footprint := footprints.get((summary.size, summary.method))) and footprint.milliseconds
        ]
        several = len({summary.size for summary in students}) > 1 or any(
            model.int8_score is not None for model in models
        )
        if several and len(models) > 1:
            draw_accuracy_against_latency(models, folder / f"{name}-latency", figure.label)
            pictures.append(Picture(folder / f"{name}-latency.svg", f"{figure.title}: score against speed"))
    return pictures


def _in_int8(summary: Summary, footprint: Footprint, runs: list[FinishedRun]) -> tuple[float | None, float | None]:
    """Milliseconds a sentence and the score of a method's models with int8 weights: its mean over all seeds, and what
    the weights change in the seeds that are exported."""
    changes = [
        change
        for run in runs
        if (run.size, run.method, run.task.name) == (summary.size, summary.method, summary.figure.task.name)
        and (change := run.int8_change(summary.figure)) is not None
    ]
    if not changes or footprint.int8_milliseconds is None:
        return None, None
    return footprint.int8_milliseconds, (summary.mean + sum(changes) / len(changes)) / 100


def run_pictures(runs: list[FinishedRun]) -> list[Picture]:
    """Those of each method's first seed: further seeds show much the same."""
    first = {(run.task.name, run.size, run.method): run for run in reversed(runs)}
    chosen = [run for run in runs if run in first.values()]
    return [Picture(path, f"{run.name}: {path.stem}") for run in chosen for path in run.pictures]
