"""Names beside the ends of curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fastai_lsuv.plots.style import Bools, shortened

MAX_NAME = 32  # characters shown of each
TOP, BOTTOM = 0.97, 0.03  # where a triangle stands for what lies beyond, as a share of the axis's height
APART = 0.085  # smallest distance of two names at the end of the curves, as a share of the axis's height

Style = tuple[str, str]  # a colour and a dash


def is_beyond(ax: Axes, values: pd.Series[float], edge: float) -> Bools:
    """Which values lie beyond the axis's `TOP` or `BOTTOM`."""
    y = np.asarray(values, np.float64)
    if edge == TOP:
        return y == np.inf
    return (y <= 0) if ax.get_yscale() == "log" else (y == -np.inf)


def name_ends(ax: Axes, curves: pd.DataFrame, styles: dict[str, Style], most: int) -> None:
    """Write the layers' names beside the ends of their curves: all, or the extremes of more than `most`."""
    ax.set_ylim(ax.get_ylim())  # as it will be
    ends = [(end, layer) for layer in styles if (end := _end(ax, curves[layer])) is not None]
    ends.sort(key=lambda pair: pair[0])
    if len(styles) > most:
        ends = [*ends[:1], *ends[1:][-1:]]
    for (end, layer), height in zip(ends, _apart([end for end, _ in ends]), strict=True):
        color, dash = styles[layer]
        ax.plot((1.005, 1.03), (end, height), dash, color=color, linewidth=1.2, transform=ax.transAxes, clip_on=False)
        ax.text(
            1.035,
            height,
            shortened(layer or "(model)", MAX_NAME),
            va="center",
            fontsize="small",
            transform=ax.transAxes,
        )


def _end(ax: Axes, curve: pd.Series[float]) -> float | None:
    """Height of a curve's last point on the axes, from 0 to 1; `None` if it has no point."""
    last = curve.dropna().iloc[-1:]
    for edge in (TOP, BOTTOM):
        if is_beyond(ax, last, edge).any():
            return edge
    heights = (ax.transScale + ax.transLimits).transform([(1.0, y) for y in last])
    return float(heights[0, 1]) if len(heights) else None


def _apart(heights: Sequence[float]) -> list[float]:
    """The ascending heights, moved so that names beside them don't overlap."""
    placed = list(heights)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + APART)
    top = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = top = min(placed[i], top)
        top -= APART
    return placed
