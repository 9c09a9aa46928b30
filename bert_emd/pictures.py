"""Pictures of a run (matplotlib)."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

_TITLES = {"attention": "attention scores", "hidden": "hidden states"}


def draw_flow(run: str | Path, path: str | Path) -> None:
    """The average flow of a run's `flows.npz`: a panel each for attention scores and hidden states.

    Rows are student layers, columns teacher layers; a cell's number is the share, in per cent, of all weight that moved
    between its two layers. The grey scale is common to both panels and prints well.
    """
    with np.load(Path(run) / "flows.npz", allow_pickle=False) as arrays:
        steps = np.diff(arrays["steps"], prepend=0)  # how many each record stands for
        flows = {
            branch: 100 * np.average(arrays[f"{branch}_flow"], axis=0, weights=steps)
            for branch in _TITLES
            if f"{branch}_flow" in arrays
        }
    student_layers, teacher_layers = next(iter(flows.values())).shape
    top = max(flow.max() for flow in flows.values())
    figure, axes = pyplot.subplots(
        1,
        len(flows),
        figsize=(len(flows) * (1.6 + 0.55 * teacher_layers), 1.5 + 0.5 * student_layers),
        layout="constrained",
        squeeze=False,
    )
    for axis, (branch, flow) in zip(axes[0], flows.items(), strict=True):
        image = axis.imshow(flow, cmap="Greys", vmin=0, vmax=top, aspect="auto")
        for i in range(student_layers):
            for j in range(teacher_layers):
                if flow[i, j] >= 0.5:
                    shade = "white" if flow[i, j] > 0.6 * top else "black"
                    axis.text(j, i, f"{flow[i, j]:.0f}", ha="center", va="center", color=shade)
        axis.set_title(_TITLES[branch])
        axis.set_xlabel("teacher layer")
        axis.set_xticks(range(teacher_layers), range(1, teacher_layers + 1))
        axis.set_yticks(range(student_layers), range(1, student_layers + 1))
    axes[0][0].set_ylabel("student layer")
    figure.colorbar(image, ax=axes, label="% of all weight")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
