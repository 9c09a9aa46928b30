"""Pictures of methods side by side, for the screen and for print (matplotlib); drawn as `bert_emd.pictures` does it."""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from bert_emd.pictures import DASHES, GREYS, MARKERS, STYLE, name_ends, save_picture
from experiments.comparison import Summary

# Curves and their bands over seeds that can be told apart.
MOST_CURVES = 3


def draw_dev_scores(methods: dict[str, list[str | Path]], path: str | Path, score: str = "accuracy") -> Figure:
    """Dev `score` against training steps, from `eval_results.json` of each method's run folders, one for each seed.

    A method is a line, named at its end: the mean over its seeds, in a band from the lowest to the highest; give
    `MOST_CURVES` at most. Steps that some of a method's runs lack are left out. Raises ValueError where no step is
    left.
    """
    found = {name: _read_scores(runs, f"eval_{score}") for name, runs in methods.items()}
    title = "mean over seeds, and a band from lowest to highest"
    if not any(len(runs) > 1 for runs in methods.values()):
        title = "one run each"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 3.4), layout="constrained")
        axis = figure.subplots()
        axis.margins(x=0.02)
        for k, (name, (steps, scores)) in enumerate(found.items()):
            grey, marker = GREYS[k % len(GREYS)], MARKERS[k % len(MARKERS)]
            style = {"linestyle": DASHES[k % len(DASHES)], "color": grey}
            axis.plot(steps, scores.mean(axis=0), marker=marker, markersize=4, linewidth=1.4, label=name, **style)
            _draw_band(axis, steps, scores, **style)
        ends = [(steps[-1], scores.mean(axis=0)[-1]) for steps, scores in found.values()]
        name_ends(axis, *map(np.array, zip(*ends, strict=True)), list(methods), height=2.8)
        axis.set_title(title)
        axis.set_xlabel("training step")
        axis.set_ylabel(f"dev {score}")
        return save_picture(figure, path)


def _draw_band(axis: Axes, steps: np.ndarray, scores: np.ndarray, color: str, linestyle: str) -> None:
    """From the lowest to the highest of several runs (runs, steps); nothing for one."""
    if len(scores) > 1:
        low, high = scores.min(axis=0), scores.max(axis=0)
        axis.fill_between(steps, low, high, facecolor=color, alpha=0.12, linewidth=0)
        for edge in (low, high):
            axis.plot(steps, edge, linewidth=0.5, color=color, linestyle=linestyle)


def draw_forest(rows: list[Summary], path: str | Path) -> Figure:
    """What each method adds to the baseline on one figure, in points; `rows` have a difference each.

    A mark is the mean over seeds, its line the 95 % interval, or of a method without one, none; full marks are claims,
    better or worse. Differences within the grey band are smaller than matters.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 0.9 + 0.22 * len(rows)), layout="constrained")
        axis = figure.subplots()
        axis.axvspan(-rows[0].margin, rows[0].margin, color="0.9", linewidth=0)
        axis.axvline(0, color="0", linewidth=0.8)
        for place, row in enumerate(rows):
            if row.interval:
                axis.plot(row.interval, [place, place], color="0", linewidth=1.2, solid_capstyle="butt")
            axis.plot(row.difference, place, "o", color="0", markersize=5, markerfacecolor="0" if row.claim else "1")
        _name_rows(axis, [row.name for row in rows])
        axis.set_xlabel(f"points against the baseline; the band is ±{rows[0].margin:g}")
        axis.set_title(f"{rows[0].figure.title}: difference to the baseline, 95 % interval")
        return save_picture(figure, path)


def draw_methods(rows: list[Summary], lines: dict[str, float], path: str | Path) -> Figure:
    """One figure of each method, in points: small dots are seeds, the mark their mean, its line the 95 % interval of
    that mean over seeds (t). `lines`: scores to compare with, by name."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 1.1 + 0.22 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for k, (name, score) in enumerate(lines.items()):
            axis.axvline(score, color="0.4", linewidth=1, linestyle=DASHES[k % len(DASHES)], label=name)
        for place, row in enumerate(rows):
            axis.plot(row.values, [place] * len(row.values), ".", color="0.55", markersize=4)
            if row.sd is not None:
                reach = row.sd * stats.t.ppf(0.975, len(row.values) - 1) / len(row.values) ** 0.5
                axis.plot([row.mean - reach, row.mean + reach], [place, place], color="0", linewidth=1.2)
            axis.plot(row.mean, place, "o", color="0", markersize=5)
        _name_rows(axis, [row.name for row in rows])
        if lines:
            figure.legend(loc="outside lower center", ncols=len(lines), frameon=False)
        seeds = sorted({len(row.values) for row in rows})
        axis.set_title(f"{rows[0].figure.title}: mean of {' or '.join(map(str, seeds))} seeds, 95 % interval")
        return save_picture(figure, path)


def _name_rows(axis: Axes, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


@dataclass(frozen=True)
class Speed:
    """A model's milliseconds a sentence and score, and those of its export with int8 weights, where there is one."""

    name: str
    milliseconds: float
    score: float
    int8_milliseconds: float | None = None
    int8_score: float | None = None


def draw_accuracy_against_latency(models: list[Speed], path: str | Path, score: str = "dev accuracy") -> Figure:
    """A point for each model, named beside it, and joined to it a hollow one for its export with int8 weights. Up and
    left is better."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 3.4), layout="constrained")
        axis = figure.subplots()
        for k, model in enumerate(models):
            marker = MARKERS[k % len(MARKERS)]
            if model.int8_score is not None:
                ends = (model.milliseconds, model.int8_milliseconds), (model.score, model.int8_score)
                axis.plot(*ends, marker, color="0.4", linestyle=":", markersize=6, markerfacecolor="1", zorder=1)
            axis.plot(model.milliseconds, model.score, marker, color="0", markersize=6)
        axis.margins(0.15)
        axis.set_xlim(left=0)
        places = np.array([model.milliseconds for model in models]), np.array([model.score for model in models])
        name_ends(axis, *places, [model.name for model in models], height=2.8)
        if any(model.int8_score is not None for model in models):
            axis.set_title("full marks: PyTorch, float32; hollow ones: ONNX, int8")
        axis.set_xlabel("milliseconds a sentence")
        axis.set_ylabel(score)
        return save_picture(figure, path)


def _read_scores(runs: list[str | Path], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (K,) at which all `runs` were evaluated, and their scores there (runs, K)."""
    histories = [json.loads((Path(run) / "eval_results.json").read_text(encoding="utf-8"))["history"] for run in runs]
    by_step = [{entry["step"]: entry[key] for entry in history if key in entry} for history in histories]
    steps = sorted(set.intersection(*map(set, by_step)))
    if not steps:
        raise ValueError(f"no step at which {key} of all of these was measured: {', '.join(map(str, runs))}")
    return np.array(steps), np.array([[scores[step] for step in steps] for scores in by_step])
