"""Frames in, figures out: how the statistics of activations move over the steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fastai_lsuv.figure import Bools, Floats, finish, mark_epochs, new_figure, scale_mean, scale_std, shortened

__all__ = ["plot_layer", "plot_stats"]

LABELS = {
    "mean": "mean of the output",
    "std": "std of the output",
    "near_zero": "share near zero",
    "grad_mean": "mean of the gradient",
    "grad_std": "std of the gradient",
}

# Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow; the dashes differ as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333")
DASHES = ("-", "--", "-.")
MAX_NAMED = 10  # layers that each have a colour and a name of their own; more are coloured by depth
DEPTHS = ("viridis", 0.0, 0.9)  # even to the eye and to colour-blind eyes; its end is too pale for white paper
MAX_TICKS = 12  # names beside the colour bar
MAX_POINTS = 1000  # of one curve
TOP, BOTTOM = 0.97, 0.03  # where a triangle stands for what lies beyond, as a share of the axis's height
APART = 0.085  # smallest distance of two names at the end of the curves, as a share of the axis's height

Style = tuple[str, str]  # a colour and a dash
Phases = dict[str, pd.DataFrame]  # of "train" and "valid": a row a step, a column a layer


def plot_stats(
    frame: pd.DataFrame,  # tidy: `fit, epoch, step, phase, layer, mean, std, near_zero`, perhaps `grad_mean, grad_std`
) -> Figure:
    """Draw mean, std and near-zero share (0 to 1) of each layer's output over the steps of training.

    A row is one record of one layer; layers stand in the order in which they first appear. Up to ten are told apart by
    colour and dash and named where they end; more are coloured by depth, and in each panel the highest and the lowest
    are named. Records of phase "valid" are circles, a step's records averaged. A NaN leaves a gap; where a curve
    leaves its axis for infinity, or for zero on a log axis, there is a triangle at the edge.
    """
    tables = _tables(frame)
    layers = list(frame["layer"].unique())
    styles = dict(zip(layers, _styles(len(layers)), strict=True))
    fig = new_figure(width=11.0, height=0.6 + 2.3 * len(tables))
    axes = list(fig.subplots(len(tables), sharex=True, squeeze=False).flat)
    for ax, (quantity, table) in zip(axes, tables.items(), strict=True):
        _panel(ax, quantity, table, styles)
        mark_epochs(ax, frame, numbered=ax is axes[0])
        _name_ends(ax, table["train"], styles)
    _label_steps(axes, frame)
    if len(layers) > MAX_NAMED:
        _depth_bar(fig, axes, layers)
    finish(fig, _title(frame, f"{len(layers)} layers" if len(layers) != 1 else str(layers[0])))
    return fig


def plot_layer(
    frame: pd.DataFrame,  # as for `plot_stats`
    name: str,  # the layer
) -> Figure:
    """Draw the statistics of one layer's output over the steps of training, side by side: fastai's `plot_layer_stats`.

    Raises `ValueError` if the frame has no layer of that name.
    """
    rows = frame[frame["layer"] == name]
    if rows.empty:
        raise ValueError(f"no records of a layer {name!r}; there are {', '.join(map(repr, frame['layer'].unique()))}")
    tables = _tables(rows)
    fig = new_figure(width=1.0 + 3.8 * len(tables), height=3.6)
    axes = list(fig.subplots(1, len(tables), squeeze=False).flat)
    for ax, (quantity, table) in zip(axes, tables.items(), strict=True):
        _panel(ax, quantity, table, {name: _styles(1)[0]})
        mark_epochs(ax, rows)
    _label_steps(axes, rows)
    finish(fig, _title(rows, name or "(model)"))
    return fig


def _tables(frame: pd.DataFrame) -> dict[str, Phases]:
    """For each quantity in the frame and each phase: a row a step, a column a layer."""
    return {quantity: _table(frame, quantity) for quantity in LABELS if quantity in frame}


def _table(frame: pd.DataFrame, quantity: str) -> Phases:
    layers = list(frame["layer"].unique())
    by_phase = {phase: frame[frame["phase"] == phase] for phase in ("train", "valid")}
    return {
        phase: rows.pivot_table(index="step", columns="layer", values=quantity, dropna=False).reindex(columns=layers)
        for phase, rows in by_phase.items()
    }


def _styles(n: int) -> list[Style]:
    """A colour and a dash for each of n layers."""
    if n <= MAX_NAMED:
        return [(COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i in range(n)]
    return [(color, "-") for color in _depth_colors(n)]


def _depth_colors(n: int) -> list[str]:
    name, first, last = DEPTHS
    return [to_hex(color) for color in matplotlib.colormaps[name](np.linspace(first, last, n))]


def _panel(ax: Axes, quantity: str, table: Phases, styles: dict[str, Style]) -> None:
    """The curves of one quantity, on the scale that it needs."""
    values = np.concatenate([phase.to_numpy(float).ravel() for phase in table.values()])
    if quantity == "near_zero":
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif quantity.endswith("std"):
        scale_std(ax, values)
    else:
        unit = 1.0 if quantity == "mean" else float(np.nanmedian(np.abs(values))) or 1.0
        scale_mean(ax, values, center=0.0, unit=unit)
    width, size = (1.5, 4.5) if len(styles) <= MAX_NAMED else (0.9, 2.5)
    for layer, (color, dash) in styles.items():
        _curve(ax, table["train"][layer], layer, color=color, linestyle=dash, linewidth=width)
        circles = table["valid"][layer]
        ax.plot(circles.index, circles, "o", color=color, markersize=size, markerfacecolor="white", label=f"_{layer}")
    ax.set_ylabel(LABELS[quantity])


def _curve(ax: Axes, curve: pd.Series[float], label: str, **style: Any) -> None:
    """One layer's line, and a triangle wherever it leaves the axis."""
    x, y = (np.asarray(values, np.float64) for values in (curve.index, curve))
    kept = _spanning(y)
    ax.plot(x[kept], y[kept], marker="" if len(y) > 1 else ".", label=label, **style)
    for beyond, height, triangle in zip(_beyond(ax, y), (TOP, BOTTOM), ("^", "v"), strict=True):
        leaves = beyond & ~np.append(False, beyond[:-1])
        heights = np.full(int(leaves.sum()), height)
        ax.plot(x[leaves], heights, triangle, color=style["color"], markersize=6, transform=ax.get_xaxis_transform())


def _beyond(ax: Axes, y: Floats) -> tuple[Bools, Bools]:
    """Which values the axis cannot show: those above it, and those below."""
    return y == np.inf, (y <= 0) if ax.get_yscale() == "log" else (y == -np.inf)


def _spanning(y: Floats) -> npt.NDArray[np.intp]:
    """Positions of at most `MAX_POINTS` values, each stretch's lowest and highest among them: no spike is lost."""
    stretch = -(-2 * len(y) // MAX_POINTS)
    if stretch <= 2:
        return np.arange(len(y))
    rows = np.pad(y, (0, -len(y) % stretch), constant_values=np.nan).reshape(-1, stretch)
    gaps = np.isnan(rows)
    ends = [np.where(gaps, np.inf, rows).argmin(axis=1), np.where(gaps, -np.inf, rows).argmax(axis=1)]
    kept = np.unique(np.arange(len(rows)) * stretch + np.stack(ends))
    return np.append(kept[kept < len(y) - 1], len(y) - 1)


def _name_ends(ax: Axes, curves: pd.DataFrame, styles: dict[str, Style]) -> None:
    """Write the layers' names beside the ends of their curves: all, or the highest and the lowest of many."""
    ax.set_ylim(ax.get_ylim())  # as it will be
    ends = sorted((end, layer) for layer in styles if (end := _end(ax, curves[layer])) is not None)
    if len(styles) > MAX_NAMED:
        ends = [*ends[:1], *ends[1:][-1:]]
    for (end, layer), height in zip(ends, _apart([end for end, _ in ends]), strict=True):
        color, dash = styles[layer]
        ax.plot((1.005, 1.03), (end, height), dash, color=color, linewidth=1.2, transform=ax.transAxes, clip_on=False)
        ax.text(1.035, height, shortened(layer or "(model)"), va="center", fontsize="small", transform=ax.transAxes)


def _end(ax: Axes, curve: pd.Series[float]) -> float | None:
    """Height of a curve's last point on the axes, from 0 to 1; `None` if it has no point."""
    last = np.asarray(curve.dropna().iloc[-1:], np.float64)
    if not last.size:
        return None
    above, below = _beyond(ax, last)
    if above or below:
        return TOP if above else BOTTOM
    return float((ax.transScale + ax.transLimits).transform((1.0, last[0]))[1])


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


def _label_steps(axes: Sequence[Axes], frame: pd.DataFrame) -> None:
    circles = "; circles: validation" if (frame["phase"] == "valid").any() else ""
    for ax in axes:
        ax.margins(x=0.01)
        ax.set_xlabel(f"step, in training batches{circles}")
        ax.label_outer()


def _depth_bar(fig: Figure, axes: Sequence[Axes], layers: Sequence[str]) -> None:
    """A colour bar that tells the depth, the first layer on top."""
    n = len(layers)
    shown = np.unique(np.linspace(0, n - 1, min(n, MAX_TICKS)).round().astype(int))
    colors = ScalarMappable(BoundaryNorm(np.arange(n + 1) - 0.5, n), ListedColormap(_depth_colors(n)))
    bar = fig.colorbar(colors, ax=axes, ticks=shown, fraction=0.03, aspect=60, spacing="proportional")
    bar.ax.set_yticklabels([shortened(layers[i]) for i in shown], fontsize="small")
    bar.ax.invert_yaxis()


def _title(frame: pd.DataFrame, of: str) -> str:
    """What is shown, and where the numbers ended, if they did."""
    if frame.empty:
        return "Activations: nothing recorded"
    records = frame["step"].nunique()
    shown = f"Activations of {of}, {records} records" if records > 1 else f"Activations of {of}, one record"
    finite = np.isfinite(frame[["mean", "std"]].to_numpy(float)).all(axis=1)
    broken = frame[frame["near_zero"].notna() & ~finite].nsmallest(1, "step")
    if broken.empty:
        return shown
    step, layer = broken[["step", "layer"]].to_numpy()[0]
    return f"{shown}; not finite from step {step} on, first in {shortened(layer)}"
