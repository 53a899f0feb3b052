"""Frames in, figures out: how the statistics of activations move over the steps of training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from fastai_lsuv.plots.names import MAX_NAME, Style, name_ends
from fastai_lsuv.plots.palette import by_order
from fastai_lsuv.plots.panels import LABELS, MAX_NAMED, OF_ONE, Tables, panel, per_point, styles, tables, values
from fastai_lsuv.plots.style import Floats, finish, mark_epochs, new_figure, shortened

__all__ = ["plot_layer", "plot_runs", "plot_stats"]

MAX_TICKS = 12  # names beside the colour bar

Band = tuple[float, float] | None  # of updates that are known to work


def plot_stats(
    frame: pd.DataFrame,  # tidy: `fit, epoch, step, phase, layer, mean, std, near_zero`, perhaps `signal, update, …`
    activations: Collection[str] = (),  # layers that have no parameters: of many layers, a column of their own
    band: Band = None,  # of updates that are known to work
) -> Figure:
    """Draw what was recorded of each layer's output over the steps of training, a panel a quantity.

    A row is one record of one layer; layers stand in the order in which they first appear, and are coloured by it, from
    dark to light. Up to ten are named where they end; of more, a colour bar names some, and each panel the highest and
    the lowest. Of more than 250 records, medians of stretches are drawn, with a band from the lowest to the highest (of
    all layers, where they aren't named). Records of phase "valid" are circles, a step's records averaged. A NaN leaves
    a gap; where a curve leaves its axis for infinity, or for zero on a log axis, there is a triangle at the edge.
    """
    columns = _by_kind({"": frame}, activations)
    layers = list(frame["layer"].unique())
    fig = _grid(columns, layers, band)
    finish(fig, _title(frame, f"{len(layers)} layers" if len(layers) != 1 else str(layers[0])))
    return fig


def plot_runs(
    frames: Mapping[str, pd.DataFrame],  # by the run's name: as for `plot_stats`, with the same layers and columns
    activations: Collection[str] = (),  # as for `plot_stats`
    band: Band = None,
) -> Figure:
    """Draw `plot_stats` of several runs of one network side by side, on one scale."""
    layers = list(dict.fromkeys(layer for frame in frames.values() for layer in frame["layer"].unique()))
    fig = _grid(_by_kind(frames, activations), layers, band)
    ends = [f"{_span(frame, last=True)} with {run}" for run, frame in frames.items()]
    finish(fig, f"Activations of {len(layers)} layers: std in the end " + ", ".join(ends))
    return fig


def plot_layer(
    frame: pd.DataFrame,  # as for `plot_stats`
    name: str,  # the layer
    band: Band = None,  # of updates that are known to work
) -> Figure:
    """Draw the statistics of one layer's output over the steps of training, side by side: fastai's `plot_layer_stats`.

    Raises `ValueError` if the frame has no layer of that name.
    """
    rows = frame[frame["layer"] == name]
    if rows.empty:
        raise ValueError(f"no records of a layer {name!r}; there are {', '.join(map(repr, frame['layer'].unique()))}")
    found = tables(rows, LABELS | OF_ONE)
    per_row = len(found) if len(found) <= 5 else -(-len(found) // 2)
    fig = new_figure(width=1.0 + 3.8 * per_row, height=3.6 * -(-len(found) // per_row))
    axes = list(fig.subplots(-(-len(found) // per_row), per_row, squeeze=False).flat)
    for ax in axes[len(found) :]:
        ax.remove()
    for ax, (quantity, table) in zip(axes, found.items(), strict=False):
        panel(ax, quantity, table, {name: styles(1)[0]}, values(table), band)
        mark_epochs(ax, rows)
    fig.supxlabel(_steps(rows), fontsize="medium")
    finish(fig, _title(rows, name or "(model)"))
    return fig


# --- a column a run, a row a quantity ---------------------------------------------------------------------------------


class _Panel(NamedTuple):
    ax: Axes
    quantity: str
    table: Tables
    looks: dict[str, Style]  # of the layers of which there is anything to draw


def _by_kind(frames: Mapping[str, pd.DataFrame], activations: Collection[str]) -> dict[str, pd.DataFrame]:
    """A column a run; of many layers two, for layers with parameters and for activations."""
    columns: dict[str, pd.DataFrame] = {}
    for run, frame in frames.items():
        of_activation = frame["layer"].isin(list(activations))
        if frame["layer"].nunique() <= MAX_NAMED or not of_activation.any() or of_activation.all():
            columns[run] = frame
        else:
            for kind, rows in (("layers with parameters", ~of_activation), ("activations", of_activation)):
                columns[f"{run}: {kind}" if run else kind] = frame[rows]
    return columns


def _grid(columns: Mapping[str, pd.DataFrame], layers: Sequence[str], band: Band) -> Figure:
    """One column a frame, with a panel for each quantity that it has: first those that all have, side by side."""
    found = [tables(frame, LABELS) for frame in columns.values()]
    in_all = [q for q in LABELS if all(q in of_frame for of_frame in found)]
    orders = [in_all + [q for q in of_frame if q not in in_all] for of_frame in found]
    n_rows = max(map(len, orders))
    fig = new_figure(width=max(11.0, 1.0 + 5.0 * len(columns)), height=0.8 + 2.3 * n_rows)
    spec = fig.add_gridspec(n_rows, len(columns))
    looks = dict(zip(layers, styles(len(layers)), strict=True))
    firsts: dict[str, Axes] = {}  # of each quantity, whose scale the others have
    grid: list[list[_Panel]] = []
    for j, (of_frame, order) in enumerate(zip(found, orders, strict=True)):
        grid.append([])
        for i, quantity in enumerate(order):
            first = firsts.get(quantity)
            ax = fig.add_subplot(spec[i, j], sharex=grid[0][0].ax if grid[0] else None, sharey=first)
            ax.tick_params(labelleft=first is None, labelbottom=i == len(order) - 1)
            firsts.setdefault(quantity, ax)
            table = of_frame[quantity]
            grid[-1].append(_Panel(ax, quantity, table, _drawn(looks, table)))
    _fill(grid, columns, band, named=len(layers) <= MAX_NAMED)
    if len(layers) > MAX_NAMED:
        _depth_bar(fig, [one.ax for column in grid for one in column], layers)
    return fig


def _drawn(looks: dict[str, Style], table: Tables) -> dict[str, Style]:
    known = {layer for phase in ("train", "valid") for layer in table[phase].columns[table[phase].notna().any()]}
    few = len(looks) <= MAX_NAMED
    return {layer: look for layer, look in looks.items() if layer in known or (few and layer in table["train"])}


def _fill(grid: Sequence[Sequence[_Panel]], columns: Mapping[str, pd.DataFrame], band: Band, named: bool) -> None:
    """Draw all panels, and write beside them what they are."""
    for column, (title, frame) in zip(grid, columns.items(), strict=True):
        for one in column:
            panel(one.ax, one.quantity, one.table, one.looks, _of_all(grid, one.quantity), band, named)
            mark_epochs(one.ax, frame, numbered=one is column[0])
        column[-1].ax.set_xlabel(_steps(frame))
        if title:
            column[0].ax.set_title(title, pad=24, fontweight="bold")
    for one in (one for column in grid for one in column):  # once all scales are settled
        curves = one.table["train"] if len(one.table["train"]) else one.table["valid"]
        name_ends(one.ax, curves, one.looks, MAX_NAMED)


def _of_all(grid: Sequence[Sequence[_Panel]], quantity: str) -> Floats:
    return np.concatenate([values(one.table) for column in grid for one in column if one.quantity == quantity])


def _depth_bar(fig: Figure, axes: Sequence[Axes], layers: Sequence[str]) -> None:
    """A colour bar that tells the depth, the first layer on top."""
    n = len(layers)
    shown = np.unique(np.linspace(0, n - 1, min(n, MAX_TICKS)).round().astype(int))
    colors = ScalarMappable(BoundaryNorm(np.arange(n + 1) - 0.5, n), ListedColormap(by_order(n)))
    bar = fig.colorbar(colors, ax=axes, ticks=shown, fraction=0.03, aspect=60, spacing="proportional")
    bar.ax.set_yticklabels([shortened(layers[i], MAX_NAME) for i in shown], fontsize="small")
    bar.ax.invert_yaxis()
    bar.ax.minorticks_off()
    bar.set_label(f"colour of a curve: its layer, from the first of {n} (dark) to the last (light)")


# --- words ------------------------------------------------------------------------------------------------------------


def _steps(frame: pd.DataFrame) -> str:
    """What stands below the axis."""
    together = per_point(frame.loc[frame["phase"] == "train", "step"].nunique())
    medians = f"; lines: medians of {together} records, bands: lowest to highest" if together > 1 else ""
    circles = "; circles: validation" if (frame["phase"] == "valid").any() else ""
    return f"step, in training batches{medians}{circles}"


def _span(frame: pd.DataFrame, last: bool) -> str:
    """From the lowest to the highest std of all layers in the first record, or in the last."""
    steps = frame.loc[np.isfinite(frame["std"].astype(float)), "step"]
    stds = frame.loc[steps[steps == (steps.max() if last else steps.min())].index, "std"].astype(float)
    low, high = (f"{std:.2g}" for std in (stds.min(), stds.max()))
    return low if low == high else f"{low} to {high}"


def _title(frame: pd.DataFrame, of: str) -> str:
    """What became of the layers, and where the numbers ended, if they did."""
    if frame.empty:
        return "Activations: nothing recorded yet; a fit with this recorder does, learn.fit(1, cbs=recorder)"
    records = frame["step"].nunique()
    shown = f"Activations of {of}, {records} records" if records > 1 else f"Activations of {of}, one record"
    finite = np.isfinite(frame[["mean", "std"]].to_numpy(float)).all(axis=1)
    broken = frame[frame["near_zero"].notna() & ~finite].nsmallest(1, "step")
    if broken.empty:
        return f"{shown}: std {_span(frame, last=False)} at first, {_span(frame, last=True)} in the end"
    step, layer = broken[["step", "layer"]].to_numpy()[0]
    return f"{shown}; first not finite at step {step}, in {shortened(layer)}"
