"""The pictures of a comparison: those drawn of its figures, and those that the runs have of their own."""

from pathlib import Path

from experiments.comparison import TEACHER, Comparison
from experiments.finished_runs import FinishedRun
from experiments.model_footprints import Footprints
from experiments.report import Picture
from experiments.score_pictures import draw_accuracy_against_latency, draw_dev_scores


def draw_pictures(
    runs: list[FinishedRun], comparison: Comparison, footprints: Footprints, folder: Path
) -> list[Picture]:
    """Into `folder`, for each figure: the dev score over training, a line for each method, and the score against the
    time for a sentence, where it was measured. PNG and SVG."""
    pictures = []
    for figure in comparison.figures:
        metric = figure.key.removeprefix("eval_")
        name = figure.title.lower().replace(" ", "-").replace("ρ", "rho")
        methods: dict[str, list[FinishedRun]] = {}
        for run in runs:
            if run.method != TEACHER and run.task.name == figure.task.name:
                methods.setdefault(label(run.size, run.method), []).append(run)
        lines = {
            method: [run.folder for run in of_it]
            for method, of_it in methods.items()
            if set.intersection(*(run.evaluations(figure) for run in of_it))
        }
        if lines:
            draw_dev_scores(lines, folder / f"{name}-training", metric)
            pictures.append(Picture(folder / f"{name}-training.svg", f"{figure.title}: dev score over training"))
        models = [
            (label(summary.size, summary.method), footprint.milliseconds / 1000, summary.mean / 100)
            for summary in comparison.summaries
            if summary.figure == figure
            and (footprint := footprints.get((summary.size, summary.method)))
            and footprint.milliseconds
        ]
        if len(models) > 1:
            draw_accuracy_against_latency(models, folder / f"{name}-latency", metric)
            pictures.append(Picture(folder / f"{name}-latency.svg", f"{figure.title}: dev score against speed"))
    return pictures


def label(size: str | None, method: str) -> str:
    return f"{method}, {size}" if size else method


def run_pictures(runs: list[FinishedRun]) -> list[Picture]:
    """Those of each method's first seed: further seeds show much the same."""
    first = {(run.task.name, run.size, run.method): run for run in reversed(runs)}
    chosen = [run for run in runs if run in first.values()]
    return [Picture(path, f"{run.name}: {path.stem}") for run in chosen for path in run.pictures]
