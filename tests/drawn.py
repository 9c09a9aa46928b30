"""What tests ask of a picture: the words in it, and whether names stand apart."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text


def texts(path: str | Path) -> list[str]:
    """What is written in an SVG, as letters."""
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    return ["".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("}text")]


def assert_apart(axis: Axes) -> None:
    """No name beside the axes covers another, or lies far off them."""
    figure = axis.figure
    figure.draw_without_rendering()
    middles = np.sort([Text.get_window_extent(name).get_points()[:, 1].mean() for name in axis.texts])
    point = figure.dpi / 72
    assert (np.diff(middles) > 7.5 * point).all()
    panel = axis.get_window_extent()
    assert middles[0] > panel.y0 - 6 * point and middles[-1] < panel.y1 + 6 * point
