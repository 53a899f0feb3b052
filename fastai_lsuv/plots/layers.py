"""Frames in, figures out: the figures of LSUV itself."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastai_lsuv.plots.palette import LOOKS
from fastai_lsuv.plots.style import (
    Floats,
    finish,
    legend,
    mark_level,
    new_figure,
    scale_accuracy,
    scale_mean,
    scale_std,
    shortened,
)

__all__ = ["plot_demo", "plot_report"]

SERIES = (LOOKS["default"], LOOKS["LSUV"])  # the network as it came, and after LSUV
BANDS = (("skipped", "#E2E2E2", ""), ("not_converged", "#F5D6E6", "////"))
HATCHING = "#C58AAA"

LABELS = "std of the output", "mean of the output", "signal:\nshare due to the input", "gradient:\nelasticity"
MAX_LABELS = 40  # layer names below one axis


def plot_report(
    frame: pd.DataFrame,  # one row per layer in execution order, as `LSUVReport.to_frame()` gives it
    mean: float | None = 0.0,  # target mean; `None`: means were left alone
    std: float | None = 1.0,  # target standard deviation; `None`: it was left alone
    verdict: str = "",  # whether the network can be trained, for the title
    lost: float = 0.1,  # signal below which it can't
) -> Figure:
    """Draw std, mean and signal of each layer's output, before beside after, and how a gradient travels back.

    Reads the columns `name`, `status`, `std_before`, `std_after`, `mean_before`, `mean_after`, `signal_before`,
    `signal_after`, `spread_after` and `grad_after`. A NaN (a layer that was never called) leaves a gap; what an axis
    cannot show (infinity, zero on a log axis) is a triangle at the edge it lies beyond. Layers that were skipped or did
    not converge stand on a band. With `mean` and `std` both `None`, a mere measurement, "after" has nothing to say and
    is left out.
    """
    times = ["before"] if mean is None and std is None else ["before", "after"]
    fig = new_figure(width=min(max(8.0, 3 + 0.22 * len(frame)), 15.0), height=10.0)
    axes = fig.subplots(4, sharex=True, height_ratios=[3, 2, 2, 2])
    std_ax, mean_ax, signal_ax, grad_ax = axes
    for ax, quantity in zip(axes, ("std", "mean", "signal"), strict=False):
        values = frame[[f"{quantity}_{time}" for time in times]].astype(float)
        values.columns = pd.Index(times if len(times) > 1 else ["measured"])
        if quantity == "std":
            scale_std(ax, values, std)
        elif quantity == "mean":
            scale_mean(ax, values, center=mean or 0.0, unit=std or 1.0)
        _curves(ax, values)
    for ax, target in ((std_ax, std), (mean_ax, mean)):
        if target is not None:
            mark_level(ax, target, "target")
    signal_ax.set_ylim(-0.03, 1.03)
    judged = (frame["signal_after"].astype(float) * frame["spread_after"].astype(float)).to_numpy()
    signal_ax.plot(judged, color=SERIES[len(times) - 1].color, linestyle=":", linewidth=1.5, label="× spread")
    mark_level(signal_ax, lost, "lost below")
    legend(signal_ax)
    grads = frame[["grad_after"]].astype(float)
    scale_std(grad_ax, grads)
    _curves(grad_ax, grads, first=len(times) - 1)
    for ax, label in zip(axes, LABELS, strict=True):
        _bands(ax, frame["status"])
        ax.set_ylabel(label)
    _name_layers(grad_ax, frame["name"])
    legend(std_ax)
    finish(fig, _report_title(frame, mean, std) + f"\n{verdict}" * bool(verdict))
    return fig


def plot_demo(
    stds: pd.DataFrame,  # std of each layer's output: a row a layer in execution order, a column for each of two runs
    accuracies: pd.DataFrame,  # validation accuracy, 0 to 1: a row an epoch, indexed by its number, the same columns
    chance: float = 0.1,  # accuracy of a blind guess, 0 to 1
) -> Figure:
    """Draw two runs side by side: on the left the signal before training, on the right what training makes of it."""
    fig = new_figure(width=10.0, height=4.4)
    std_ax, accuracy_ax = fig.subplots(1, 2)
    scale_std(std_ax, stds)
    _curves(std_ax, stds)
    _name_layers(std_ax, stds.index)
    std_ax.set_ylabel("std of the output, before training")

    epochs = accuracies.index.to_numpy(float)
    _curves(accuracy_ax, accuracies, x=epochs)
    scale_accuracy(accuracy_ax, chance)
    accuracy_ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    accuracy_ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    accuracy_ax.set_xlabel("epoch")
    accuracy_ax.set_ylabel("validation accuracy")

    legend(std_ax)
    legend(accuracy_ax)
    reached = ", ".join(f"{accuracy:.1%} with {run}" for run, accuracy in accuracies.iloc[-1].items())
    finish(fig, f"A plain network of {len(stds)} layers: {reached}")
    return fig


def _curves(ax: Axes, values: pd.DataFrame, x: Floats | None = None, first: int = 0) -> None:
    """One line per column, over 0, 1, 2... or `x`; a triangle at the edge for what lies beyond it."""
    positions = np.arange(float(len(values))) if x is None else x
    size = 6.0 if len(values) <= MAX_LABELS else 3.0
    edge = ax.get_xaxis_transform()  # x in layers, y from 0 (bottom) to 1 (top)
    for (label, column), (color, marker, dash) in zip(values.items(), SERIES[first:], strict=False):
        y = column.to_numpy(float)
        ax.plot(positions, y, dash, label=str(label), color=color, marker=marker, markersize=size, linewidth=1.5)
        above = y == np.inf
        below = (y <= 0) if ax.get_yscale() == "log" else (y == -np.inf)
        for where, height, triangle in ((above, 0.97, "^"), (below, 0.03, "v")):
            heights = np.full(int(where.sum()), height)
            ax.plot(positions[where], heights, triangle, color=color, markersize=size + 3, transform=edge)


def _bands(ax: Axes, status: pd.Series[str]) -> None:
    """A background behind each layer that missed its target."""
    for kind, color, hatch in BANDS:
        positions = np.flatnonzero(status == kind)
        for i in positions:
            band = ax.axvspan(i - 0.5, i + 0.5, facecolor=color, edgecolor=HATCHING, hatch=hatch, linewidth=0, zorder=0)
            if i == positions[0]:
                band.set_label(f"{kind.replace('_', ' ')} ({len(positions)})")


def _name_layers(ax: Axes, names: Iterable[Hashable]) -> None:
    """Write the layers' names below the axis, as many as there is room for."""
    labels = [shortened(str(name) or "(model)") for name in names]
    step = -(-len(labels) // MAX_LABELS) or 1
    shown = labels[::step]
    rotation = 0 if sum(map(len, shown)) <= MAX_LABELS else 90
    ax.set_xticks(range(0, len(labels), step), shown, rotation=rotation, fontsize="small")
    ax.set_xlim(-0.5, max(len(labels), 1) - 0.5)
    ax.set_xlabel("layer, in execution order" + (f" (one name in {step})" if step > 1 else ""))


def _report_title(frame: pd.DataFrame, mean: float | None, std: float | None) -> str:
    quantity, target = ("mean", mean) if std is None and mean is not None else ("std", std)
    before = frame[f"{quantity}_before"].astype(float).dropna()
    span = f"{before.min():.2g} to {before.max():.2g}" if before.size else "not measured"
    if target is None:
        return f"{len(frame)} layers as they are: {quantity} {span}"
    done = frame["status"].isin(["corrected", "unchanged"]).sum()
    return f"{done} of {len(frame)} layers at {quantity} {target:g}; before: {span}"
