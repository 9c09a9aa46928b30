"""Pictures of runs, for the screen and for print (matplotlib).

Each function writes `path`.png and `path`.svg and returns the figure. Sizes are those of a page, letters 8 points.
Nothing is told by colour: shades are grey, lines differ in style and have their names beside them. In an SVG letters
stay letters.
"""

from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from bert_emd.layer_mapping import BRANCHES
from bert_finetune.files import replacing_file

STYLE = {"font.size": 8, "axes.titlesize": 9, "svg.fonttype": "none", "svg.hashsalt": "bert-emd"}
_TITLES = {"attention": "attention scores", "hidden": "hidden states"}
LETTER = 9 / 72  # inches that a line of letters takes
# Intervals that a picture of a whole run shows; of a longer run several are drawn as one.
_MOST_INTERVALS = 200
# Line styles, greys and markers, told apart in print.
DASHES = ["-", "--", "-.", ":"]
GREYS = ["0", "0.3", "0.55"]
MARKERS = "osD^vPX*"


def draw_flow(run: str | Path, path: str | Path) -> Figure:
    """The average flow of a run's `flows.npz`: a panel each for attention scores and hidden states.

    Rows are student layers, columns teacher layers; a cell's number is the share, in per cent, of all weight that moved
    between its two layers (none below .5). The grey scale is common to both panels.
    """
    steps, flows = _read_flows(run)
    flows = {branch: np.average(flow, axis=0, weights=np.diff(steps)) for branch, flow in flows.items()}
    m, n = next(iter(flows.values())).shape
    top = max(flow.max() for flow in flows.values())
    width, height = max(1.5, 0.7 + 0.3 * n), max(1.2, 0.6 + 0.28 * m)
    stacked = len(flows) * width > 9
    rows, columns = (len(flows), 1) if stacked else (1, len(flows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.7 + columns * width, rows * height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (branch, flow) in zip(axes, flows.items(), strict=True):
            image = axis.imshow(flow, cmap="Greys", vmin=0, vmax=top, aspect="auto")
            for (i, j), share in np.ndenumerate(flow):
                if share >= 0.5:
                    shade = "white" if share > 0.6 * top else "black"
                    axis.text(j, i, f"{share:.0f}", ha="center", va="center", color=shade)
            axis.set_title(_TITLES[branch])
            axis.set_xticks(range(n), range(1, n + 1))
            axis.set_yticks(range(m), range(1, m + 1))
        _label_edges(axes, stacked, "teacher layer", "student layer")
        figure.colorbar(image, ax=axes, label="% of all weight")
        return save_picture(figure, path)


def draw_flow_over_training(run: str | Path, path: str | Path) -> Figure:
    """The flow of a run's `flows.npz` from its first step to its last: a panel each for attention scores and hidden
    states.

    From left to right go the training steps, from top to bottom all pairs of layers: a block for each student layer,
    in it a row for each teacher layer. Shades are the share, in per cent, of all weight that moved between the two.
    """
    steps, flows = _read_flows(run, _MOST_INTERVALS)
    m, n = next(iter(flows.values())).shape[1:]
    height = np.clip(m * (n + 1) * LETTER, 1.5, 8)
    # Teacher layers whose numbers there is room for: the first of a block, then every so many.
    stride = int(np.ceil(m * (n + 1) * LETTER / height - 0.01))
    named = [j for j in range(0, n, stride) if j == 0 or j + stride // 2 < n]
    starts = np.arange(m) * (n + 1)  # an empty row lies between blocks
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.7 + 2.5 * len(flows), height + 0.7), layout="constrained")
        axes = figure.subplots(1, len(flows), sharey=True, squeeze=False)[0]
        top = max(flow.max() for flow in flows.values())
        for axis, (branch, flow) in zip(axes, flows.items(), strict=True):
            blocks = np.pad(flow, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
            rows = blocks.reshape(len(flow), m * (n + 1)).T[:-1]
            edges = np.arange(len(rows) + 1) - 0.5
            image = axis.pcolormesh(steps, edges, rows, cmap="Greys", vmin=0, vmax=top, rasterized=True)
            axis.set_title(_TITLES[branch])
            axis.set_xlabel("training step")
            axis.set_yticks(starts + (n - 1) / 2, [f"student {i}" for i in range(1, m + 1)], rotation=90, va="center")
            axis.set_yticks(
                np.concatenate([starts + j for j in named]), np.repeat([str(j + 1) for j in named], m), minor=True
            )
            axis.yaxis.remove_overlapping_locs = False
            axis.tick_params(axis="y", which="major", length=0, pad=22)
            axis.hlines(starts[1:] - 1, 0, steps[-1], color="0.8", linewidth=0.5)
            axis.spines[:].set_visible(False)
        axes[0].invert_yaxis()
        for axis in axes[1:]:
            axis.tick_params(axis="y", which="both", labelleft=False)
        axes[0].set_ylabel("teacher layer, by student layer")
        figure.colorbar(image, ax=axes, label="% of all weight", aspect=15 * height)
        return save_picture(figure, path)


def draw_layer_weights(run: str | Path, path: str | Path) -> Figure | None:
    """The layer weights of a run's `flows.npz` over its training steps: a line for each layer, the mean between two
    records, named at its end, in a band from the least to the most.

    Student layers are on the left and teacher layers on the right, attention scores above hidden states, or one row for
    both where they share their weights. All layers of a model start with the same weight. A run without cost attention
    has no weights: nothing is written, and the result is None.
    """
    with np.load(Path(run) / "flows.npz", allow_pickle=False) as arrays:
        steps = np.concatenate([[0], arrays["steps"]])
        rows = {
            _TITLES[branch]: [
                [arrays[f"{branch}_{side}_weights{kind}"] for kind in ("", "_min", "_max")]
                for side in ("student", "teacher")
            ]
            for branch in BRANCHES
            if f"{branch}_student_weights" in arrays
        }
    if not rows:
        return None
    first, *others = rows.values()
    if others and np.array_equal(first[0], others[0][0]) and np.array_equal(first[1], others[0][1]):
        rows = {"": first}
    most = max(weights.shape[1] for weights, _, _ in first)
    height = max(1.8, (most + 2) * LETTER)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + height * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
        for panels, (title, sides) in zip(axes, rows.items(), strict=True):
            for axis, side, kinds in zip(panels, ("student", "teacher"), sides, strict=True):
                layers = kinds[0].shape[1]
                weights, least, largest = (100 * np.vstack([np.full(layers, 1 / layers), kind]) for kind in kinds)
                for k, line in enumerate(weights.T):
                    style, grey = DASHES[k % len(DASHES)], GREYS[k // len(DASHES) % len(GREYS)]
                    axis.fill_between(steps, least[:, k], largest[:, k], color=grey, alpha=0.12, linewidth=0)
                    axis.plot(steps, line, style, color=grey, linewidth=1)
                names = [f"{k}" for k in range(1, weights.shape[1] + 1)]
                name_ends(axis, steps[-1], weights[-1], names, height)
                axis.set_title(f"{side} layers, {title}" if title else f"{side} layers")
                axis.margins(x=0)
                axis.set_ylabel("% of all weight")
        for axis in axes[-1]:
            axis.set_xlabel("training step")
        return save_picture(figure, path)


# What a run's folder can have drawn of it, by the names that `LayerMapping.pictures` uses.
PICTURES = {
    "flow": draw_flow,
    "flow_over_training": draw_flow_over_training,
    "layer_weights": draw_layer_weights,
}


def _read_flows(run: str | Path, most: int | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Edges of the intervals (K + 1,), from step 0 on, and for each branch the flow in each (K, M, N), in per cent;
    neighbouring intervals are drawn together where there are more than `most`."""
    with np.load(Path(run) / "flows.npz", allow_pickle=False) as arrays:
        steps = np.concatenate([[0], arrays["steps"]])
        flows = {branch: 100 * arrays[f"{branch}_flow"] for branch in BRANCHES if f"{branch}_flow" in arrays}
    count = len(steps) - 1
    if most is None or count <= most:
        return steps, flows
    cuts = np.linspace(0, count, most + 1).astype(int)
    lengths = np.diff(steps)
    for branch, flow in flows.items():
        sums = np.add.reduceat(flow * lengths[:, None, None], cuts[:-1])
        flows[branch] = sums / np.diff(steps[cuts])[:, None, None]
    return steps[cuts], flows


def _label_edges(axes: np.ndarray, stacked: bool, below: str, left: str) -> None:
    """Name the axes where panels, stacked or side by side, do not share them."""
    for axis in axes[-1:] if stacked else axes:
        axis.set_xlabel(below)
    for axis in axes if stacked else axes[:1]:
        axis.set_ylabel(left)


def name_ends(axis: Axes, x, y: np.ndarray, names: list[str], height: float) -> None:
    """Write the names of points in a column right of the axes, each at its point's height, or moved up or down where
    it would cover another, with a thin line to its point. `height` of the axes in inches."""
    axis.spines[["top", "right"]].set_visible(False)
    low, high = axis.get_ylim()
    gap = (high - low) * LETTER / height
    order = np.argsort(y, kind="stable")
    places = np.array(y, dtype=float)
    for before, after in pairwise(order):
        places[after] = max(places[after], places[before] + gap)
    places[order[-1]] = min(places[order[-1]], high)
    for after, before in pairwise(order[::-1]):
        places[before] = min(places[before], places[after] - gap)
    axis.set_ylim(min(low, places.min()), high)
    column = axis.get_yaxis_transform() + ScaledTranslation(12 / 72, 0, axis.figure.dpi_scale_trans)
    line = {
        "arrowstyle": "-",
        "color": "0.6",
        "linewidth": 0.5,
        "relpos": (0, 0.5),
        "patchA": None,
        "shrinkA": 2,
        "shrinkB": 0,
    }
    for *point, place, name in zip(np.broadcast_to(x, y.shape), y, places, names, strict=True):
        axis.annotate(
            name, point, (1, place), textcoords=column, va="center", annotation_clip=False, arrowprops=line, zorder=1
        )


def save_picture(figure: Figure, path: str | Path) -> Figure:
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # found once, not anew for each file
    for kind in ("png", "svg"):
        with replacing_file(f"{path}.{kind}") as aside:
            figure.savefig(aside, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return figure
