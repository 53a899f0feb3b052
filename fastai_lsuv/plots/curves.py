"""Frames in, figures out: how the statistics of activations move over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastai_lsuv.plots.names import BOTTOM, MAX_NAME, TOP, Style, is_beyond, name_ends
from fastai_lsuv.plots.style import PALE, finish, mark_epochs, new_figure, scale_mean, scale_std, shortened

__all__ = ["plot_layer", "plot_runs", "plot_stats"]

LABELS = {
    "mean": "mean of the output",
    "std": "std of the output",
    "near_zero": "share near zero",
    "grad_mean": "mean of the gradient",
    "grad_std": "std of the gradient",
}

# Okabe and Ito's palette without its yellow, ordered so that those of one dash differ for all colour-blind eyes.
COLORS = ("#0072B2", "#D55E00", "#333333", "#009E73", "#56B4E9", "#CC79A7", "#E69F00")
DASHES = ("-", "--", "-.")
MAX_NAMED = 10  # layers that each have a colour and a name of their own; more are coloured by depth
DEPTHS = ("viridis", 0.0, 0.8)  # even to the eye and to colour-blind eyes; its end is too pale for white paper
MAX_TICKS = 12  # names beside the colour bar
MAX_POINTS = 250  # of one curve; of more records, it shows the medians of stretches

Tables = dict[str, pd.DataFrame]  # a row a step, a column a layer: "valid", "train", and its "lowest" and "highest"


def plot_stats(
    frame: pd.DataFrame,  # tidy: `fit, epoch, step, phase, layer, mean, std, near_zero`, perhaps `grad_mean, grad_std`
) -> Figure:
    """Draw mean, std and near-zero share (0 to 1) of each layer's output over the steps of training.

    A row is one record of one layer; layers stand in the order in which they first appear. Up to ten are told apart by
    colour and dash and named where they end; more are coloured by depth, and in each panel the highest and the lowest
    are named. Of more than 250 records, medians of stretches are drawn, with a band from the lowest to the highest (of
    all layers, where they aren't named). Records of phase "valid" are circles, a step's records averaged. A NaN leaves
    a gap; where a curve leaves its axis for infinity, or for zero on a log axis, there is a triangle at the edge.
    """
    tables = _tables(frame)
    layers = list(frame["layer"].unique())
    styles = dict(zip(layers, _styles(len(layers)), strict=True))
    fig = new_figure(width=11.0, height=0.6 + 2.3 * len(tables))
    axes = list(fig.subplots(len(tables), sharex=True, squeeze=False).flat)
    _stack(axes, frame, tables, styles)
    if len(layers) > MAX_NAMED:
        _depth_bar(fig, axes, layers)
    finish(fig, _title(frame, f"{len(layers)} layers" if len(layers) != 1 else str(layers[0])))
    return fig


def plot_runs(
    frames: Mapping[str, pd.DataFrame],  # by the run's name: as for `plot_stats`, with the same layers and columns
) -> Figure:
    """Draw `plot_stats` of several runs of one network side by side; each panel has the scale that it needs."""
    tables = {run: _tables(frame) for run, frame in frames.items()}
    layers = list(next(iter(frames.values()))["layer"].unique())
    styles = dict(zip(layers, _styles(len(layers)), strict=True))
    rows = max(map(len, tables.values()))
    fig = new_figure(width=1.0 + 6.5 * len(frames), height=0.8 + 2.3 * rows)
    grid = fig.subplots(rows, len(frames), sharex=True, squeeze=False)
    for column, (run, frame) in zip(grid.T, frames.items(), strict=True):
        _stack(list(column), frame, tables[run], styles)
        column[0].set_title(run, pad=24, fontweight="bold")
    if len(layers) > MAX_NAMED:
        _depth_bar(fig, list(grid.flat), layers)
    finish(fig, f"Activations of {len(layers)} layers")
    return fig


def _stack(axes: Sequence[Axes], frame: pd.DataFrame, tables: dict[str, Tables], styles: dict[str, Style]) -> None:
    """One panel a quantity, above one another."""
    for ax, (quantity, table) in zip(axes, tables.items(), strict=True):
        _panel(ax, quantity, table, styles)
        mark_epochs(ax, frame, numbered=ax is axes[0])
        name_ends(ax, table["train"] if len(table["train"]) else table["valid"], styles, MAX_NAMED)
    axes[-1].set_xlabel(_steps(frame))


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
    fig.supxlabel(_steps(rows), fontsize="medium")
    finish(fig, _title(rows, name or "(model)"))
    return fig


def _tables(frame: pd.DataFrame) -> dict[str, Tables]:
    """What is drawn of each quantity in the frame."""
    layers = list(frame["layer"].unique())
    tables = {}
    for quantity in LABELS:
        if quantity in frame:
            train, valid = (
                rows.pivot_table(index="step", columns="layer", values=quantity, dropna=False).reindex(columns=layers)
                for rows in (frame[frame["phase"] == phase] for phase in ("train", "valid"))
            )
            tables[quantity] = {"valid": valid, **_stretches(train)}
    return tables


def _stretches(train: pd.DataFrame) -> Tables:
    """Medians of stretches of records, where there are more than can be told apart, and what they lie between."""
    together = _together(len(train))
    if together == 1:
        return dict.fromkeys(("train", "lowest", "highest"), train)
    stretch = np.arange(len(train)) // together
    steps = train.index.to_series().groupby(stretch).mean()
    stretches = train.groupby(stretch)
    pooled = {"train": stretches.median(), "lowest": stretches.min(), "highest": stretches.max()}
    return {name: table.set_axis(steps, axis=0) for name, table in pooled.items()}


def _together(records: int) -> int:
    """How many of so many records one point of a curve stands for."""
    return -(-records // MAX_POINTS) or 1


def _styles(n: int) -> list[Style]:
    """A colour and a dash for each of n layers."""
    if n <= MAX_NAMED:
        return [(COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i in range(n)]
    return [(color, "-") for color in _depth_colors(n)]


def _depth_colors(n: int) -> list[str]:
    name, first, last = DEPTHS
    return [to_hex(color) for color in matplotlib.colormaps[name](np.linspace(first, last, n))]


def _panel(ax: Axes, quantity: str, table: Tables, styles: dict[str, Style]) -> None:
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
    if quantity.startswith("grad") and ax.get_yscale() == "linear":
        ax.yaxis.set_major_formatter("{x:.4g}")
    named = len(styles) <= MAX_NAMED
    width, size = (1.5, 4.5) if named else (0.9, 2.5)
    if not named and not table["lowest"].equals(table["highest"]):
        _band(ax, table["lowest"].min(axis=1), table["highest"].max(axis=1), PALE)
    for layer, (color, dash) in styles.items():
        curve, lowest, highest, circles = (table[what][layer] for what in ("train", "lowest", "highest", "valid"))
        if named:
            _band(ax, lowest, highest, color, alpha=0.15)
        marker = "" if len(curve) > 1 else "."
        ax.plot(curve.index, curve, dash, color=color, linewidth=width, marker=marker, label=layer)
        ax.plot(circles.index, circles, "o", color=color, markersize=size, markerfacecolor="white", label=f"_{layer}")
        _triangles(ax, lowest, highest, color)
    ax.margins(x=0.01)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    steps = table["train"].index.union(table["valid"].index)
    if len(steps) == 1:
        ax.set_xlim(steps[0] - 1, steps[0] + 1)
    ax.set_ylabel(LABELS[quantity])


def _band(ax: Axes, lowest: pd.Series[float], highest: pd.Series[float], color: str, alpha: float = 1.0) -> None:
    """Where the records lie of which a curve shows the medians."""
    if not lowest.equals(highest):
        low, high = (np.ma.masked_invalid(np.asarray(edge, np.float64)) for edge in (lowest, highest))
        ax.fill_between(np.asarray(lowest.index), low, high, color=color, alpha=alpha, linewidth=0, zorder=1)


def _triangles(ax: Axes, lowest: pd.Series[float], highest: pd.Series[float], color: str) -> None:
    """At the edge, wherever a curve leaves the axis."""
    for values, height, triangle in ((highest, TOP, "^"), (lowest, BOTTOM, "v")):
        beyond = is_beyond(ax, values, height)
        x = np.asarray(values.index)[beyond & ~np.append(False, beyond[:-1])]
        heights = np.full(len(x), height)
        ax.plot(x, heights, triangle, color=color, markersize=6, transform=ax.get_xaxis_transform())


def _steps(frame: pd.DataFrame) -> str:
    """What stands below the axis."""
    together = _together(frame.loc[frame["phase"] == "train", "step"].nunique())
    medians = f"; lines: medians of {together} records, bands: lowest to highest" if together > 1 else ""
    circles = "; circles: validation" if (frame["phase"] == "valid").any() else ""
    return f"step, in training batches{medians}{circles}"


def _depth_bar(fig: Figure, axes: Sequence[Axes], layers: Sequence[str]) -> None:
    """A colour bar that tells the depth, the first layer on top."""
    n = len(layers)
    shown = np.unique(np.linspace(0, n - 1, min(n, MAX_TICKS)).round().astype(int))
    colors = ScalarMappable(BoundaryNorm(np.arange(n + 1) - 0.5, n), ListedColormap(_depth_colors(n)))
    bar = fig.colorbar(colors, ax=axes, ticks=shown, fraction=0.03, aspect=60, spacing="proportional")
    bar.ax.set_yticklabels([shortened(layers[i], MAX_NAME) for i in shown], fontsize="small")
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
    return f"{shown}; first not finite at step {step}, in {shortened(layer)}"
