"""Pictures of methods side by side, for the screen and for print (matplotlib); drawn as `bert_emd.pictures` does it."""

import json
import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bert_emd.pictures import DASHES, GREYS, STYLE, name_ends, save_picture

# Bands over seeds that can be told apart in one panel.
_MOST_BANDS = 3
_MARKERS = "osD^vPX*"


def draw_dev_scores(methods: dict[str, list[str | Path]], path: str | Path, score: str = "accuracy") -> Figure:
    """Dev `score` against training steps, from `eval_results.json` of each method's run folders, one for each seed.

    A method is a line, named at its end: the mean over its seeds, in a band from the lowest to the highest. More than
    three methods have a panel each, with the others' means in light grey. Steps that some of a method's runs lack are
    left out. Raises ValueError where no step is left.
    """
    found = {name: _read_scores(runs, f"eval_{score}") for name, runs in methods.items()}
    title = "mean over seeds, and a band from lowest to highest"
    if not any(len(runs) > 1 for runs in methods.values()):
        title = "one run each"
    with matplotlib.rc_context(STYLE):
        if len(methods) > _MOST_BANDS:
            return save_picture(_scores_in_panels(found, title, f"dev {score}"), path)
        figure = Figure(figsize=(5.5, 3.4), layout="constrained")
        axis = figure.subplots()
        axis.margins(x=0.02)
        for k, (name, (steps, scores)) in enumerate(found.items()):
            grey, marker = GREYS[k % len(GREYS)], _MARKERS[k % len(_MARKERS)]
            style = {"linestyle": DASHES[k % len(DASHES)], "color": grey}
            axis.plot(steps, scores.mean(axis=0), marker=marker, markersize=4, linewidth=1.4, label=name, **style)
            _draw_band(axis, steps, scores, **style)
        ends = [(steps[-1], scores.mean(axis=0)[-1]) for steps, scores in found.values()]
        name_ends(axis, *map(np.array, zip(*ends, strict=True)), list(methods), height=2.8)
        axis.set_title(title)
        axis.set_xlabel("training step")
        axis.set_ylabel(f"dev {score}")
        return save_picture(figure, path)


def _scores_in_panels(found: dict[str, tuple[np.ndarray, np.ndarray]], title: str, label: str) -> Figure:
    columns = min(4, max(3, math.ceil(len(found) / 2)))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(1.8 * columns, 0.5 + 1.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (name, (steps, scores)) in zip(panels, found.items(), strict=False):
        for other, (other_steps, other_scores) in found.items():
            if other != name:
                panel.plot(other_steps, other_scores.mean(axis=0), color="0.8", linewidth=0.8)
        panel.plot(steps, scores.mean(axis=0), color="0", marker="o", markersize=2.5, linewidth=1.2, label=name)
        _draw_band(panel, steps, scores, color="0", linestyle="-")
        panel.set_title(name.replace(", ", "\n"))  # method and size
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(found) - columns) : len(found)]:  # the lowest of each column
        panel.tick_params(labelbottom=True)
    figure.suptitle(f"{title}\n(light: the other methods)", fontsize=STYLE["axes.titlesize"])
    figure.supxlabel("training step", fontsize=STYLE["font.size"])
    figure.supylabel(label, fontsize=STYLE["font.size"])
    return figure


def _draw_band(axis: Axes, steps: np.ndarray, scores: np.ndarray, color: str, linestyle: str) -> None:
    """From the lowest to the highest of several runs (runs, steps); nothing for one."""
    if len(scores) > 1:
        low, high = scores.min(axis=0), scores.max(axis=0)
        axis.fill_between(steps, low, high, facecolor=color, alpha=0.12, linewidth=0)
        for edge in (low, high):
            axis.plot(steps, edge, linewidth=0.5, color=color, linestyle=linestyle)


def draw_accuracy_against_latency(
    models: list[tuple[str, float, float]], path: str | Path, score: str = "accuracy"
) -> Figure:
    """A point for each model, named beside it: (name, seconds for a sentence, dev `score`). Up and left is better."""
    names, seconds, scores = zip(*models, strict=True)
    milliseconds = 1000 * np.array(seconds)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 3.4), layout="constrained")
        axis = figure.subplots()
        for k, point in enumerate(zip(milliseconds, scores, strict=True)):
            axis.plot(*point, _MARKERS[k % len(_MARKERS)], color="0", markersize=6)
        axis.margins(0.15)
        axis.set_xlim(left=0)
        name_ends(axis, milliseconds, np.array(scores), list(names), height=2.8)
        axis.set_xlabel("milliseconds a sentence")
        axis.set_ylabel(f"dev {score}")
        return save_picture(figure, path)


def _read_scores(runs: list[str | Path], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (K,) at which all `runs` were evaluated, and their scores there (runs, K)."""
    histories = [json.loads((Path(run) / "eval_results.json").read_text(encoding="utf-8"))["history"] for run in runs]
    by_step = [{entry["step"]: entry[key] for entry in history if key in entry} for history in histories]
    steps = sorted(set.intersection(*map(set, by_step)))
    if not steps:
        raise ValueError(f"no step at which {key} of all of these was measured: {', '.join(map(str, runs))}")
    return np.array(steps), np.array([[scores[step] for step in steps] for scores in by_step])
