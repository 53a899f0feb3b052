"""Frames in, figures out: heat maps of activations over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fastai_lsuv.plots.palette import GREY
from fastai_lsuv.plots.style import Floats, finish, mark_epochs, new_figure, shortened

__all__ = ["plot_dead", "plot_hist", "plot_hists"]

# Even to the eye and to colour-blind eyes; the darker, the more is dead.
COUNTS, DEAD = "viridis", "magma_r"
DEAD_FROM = 0.9  # share near zero from which a layer is counted in the title
MAX_COLUMNS = 500  # records that one map shows side by side; of more, neighbours are averaged
MAX_NAMES = 80  # layers' names beside one map
MAX_NAME = 40  # characters of each


def plot_dead(
    frame: pd.DataFrame,  # tidy: columns `fit, epoch, step, phase, layer, near_zero`, perhaps `dead_units`
) -> Figure:
    """Draw how much is dead: a row a layer, the first one on top, a column a training record.

    Of each layer the share of near-zero activations, or of dead units, whichever is larger: what a functional ReLU
    kills in the layer before it isn't near zero there. The scale is 0 to 100% in every figure. A layer that wasn't
    called in a record leaves a hatched patch there.
    """
    layers = list(frame["layer"].unique())
    rows = frame[frame["phase"] == "train"]
    if "dead_units" in rows:
        rows = rows.assign(near_zero=rows[["near_zero", "dead_units"]].max(axis=1))
    shares = rows.pivot_table(index="layer", columns="step", values="near_zero", dropna=False).reindex(layers)

    fig = new_figure(width=11.0, height=min(2.0 + 0.17 * len(layers), 16.0))
    ax = fig.subplots()
    image = _map(ax, shares.to_numpy(float), shares.columns, (-0.5, max(len(layers), 1) - 0.5), (0.0, 1.0), DEAD)
    mark_epochs(ax, rows)
    ax.invert_yaxis()
    every = -(-len(layers) // MAX_NAMES) or 1
    names = [shortened(layer or "(model)", MAX_NAME) for layer in layers[::every]]
    ax.set_yticks(range(0, len(layers), every), names, fontsize="small")
    ax.set_xlabel("step, in training batches")
    shown = "share near zero" + ", or of dead units" * ("dead_units" in frame)
    _color_bar(fig, ax, image, shown, format=PercentFormatter(1.0))
    finish(fig, _dead_title(shares))
    return fig


def plot_hist(
    log_counts: npt.ArrayLike,  # log(1 + count), shape (bins, records)
    records: pd.DataFrame,  # one row a record: columns `fit, epoch, step`
    name: str,  # the layer
    value_range: tuple[float, float] = (0.0, 10.0),  # of the outermost bins' edges
    ax: Axes | None = None,  # draw here; `None`: in a figure of its own
) -> Figure | Axes:
    """Draw how the histogram of one layer's activations moves over the steps: fastai's `color_dim`, with axes.

    Gives back the figure, or the `ax` that was given, whose colours are left to the user's style.
    """
    counts = np.asarray(log_counts, float)
    if ax is not None:
        _hist(ax, counts, records, value_range, _top(counts))
        ax.set_title(name or "(model)", pad=30)
        return ax
    fig = new_figure(width=11.0, height=4.2)
    own = fig.subplots()
    _color_bar(fig, own, _hist(own, counts, records, value_range, _top(counts)), "log(1 + count)")
    finish(fig, f"Histogram of the activations of {name or '(model)'}")
    return fig


def plot_hists(
    log_counts: Mapping[str, npt.ArrayLike],  # by layer: log(1 + count), shape (bins, records)
    records: pd.DataFrame,  # one row a record: columns `fit, epoch, step`
    value_range: tuple[float, float] = (0.0, 10.0),  # of the outermost bins' edges
) -> Figure:
    """Draw `plot_hist` of every layer, small, in one grid and on one scale of colours."""
    counts = {name: np.asarray(values, float) for name, values in log_counts.items()}
    top = max(map(_top, counts.values()), default=1.0)
    columns = min(6, int(np.ceil(np.sqrt(len(counts) or 1))))
    rows = -(-len(counts) // columns) or 1
    fig = new_figure(width=1.5 + 2.2 * max(columns, 3), height=0.8 + (1.35 if rows > 3 else 2.2) * rows)
    grid = list(fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    axes, empty = grid[: len(counts)], grid[len(counts) :]
    for ax, (name, values) in zip(axes, counts.items(), strict=True):
        image = _map(ax, values, records["step"], value_range, (0.0, top), COUNTS)
        mark_epochs(ax, records, numbered=False, most=8)
        ax.set_title(shortened(name or "(model)"), fontsize="small", pad=3)
    for ax in axes[-columns:]:
        ax.tick_params(labelbottom=True)  # the lowest of its column
    for ax in empty:
        ax.remove()
    if axes:
        _color_bar(fig, axes, image, "log(1 + count)")
    fig.supxlabel("step, in training batches; lines: epochs")
    fig.supylabel("value of the activations")
    finish(fig, f"Histograms of the activations of {len(counts)} layers")
    return fig


def _hist(
    ax: Axes, counts: Floats, records: pd.DataFrame, value_range: tuple[float, float], top: float
) -> ScalarMappable:
    ax.set_xlabel("step, in training batches")
    ax.set_ylabel("value of the activations")
    mark_epochs(ax, records)
    return _map(ax, counts, records["step"], value_range, (0.0, top), COUNTS)


def _color_bar(fig: Figure, axes: Axes | Sequence[Axes], image: ScalarMappable, label: str, **options: Any) -> None:
    """A narrow bar as high as the figure."""
    fig.colorbar(image, ax=axes, label=label, fraction=0.04, pad=0.01, aspect=5 * fig.get_figheight(), **options)


def _map(
    ax: Axes,
    values: Floats,
    steps: npt.ArrayLike,
    rows: tuple[float, float],
    colors: tuple[float, float],
    colormap: str,
) -> ScalarMappable:
    """An image with a column from each step to the next, of the colours' range `colors`; gaps are hatched."""
    values, edges = _columns(values, np.asarray(steps, float))
    cmap = matplotlib.colormaps[colormap].with_extremes(bad="none")  # no colour is far from all of the map's
    ax.patch.set(hatch="////", edgecolor=GREY, linewidth=0.0)
    image = ax.pcolorfast(edges, np.linspace(*rows, len(values) + 1), values, cmap=cmap)
    image.set_clim(*colors)
    ax.set(xlim=edges[[0, -1]], ylim=rows)
    return image


def _columns(values: Floats, steps: Floats) -> tuple[Floats, Floats]:
    """At most `MAX_COLUMNS` columns and the edges between them: a record holds until the next one."""
    if not values.size:
        return np.full((1, 1), np.nan), np.array([0.0, 1.0])  # nothing recorded
    together = -(-len(steps) // MAX_COLUMNS)
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    edges = np.append(steps[::together], steps[-1] + gap)
    padded = np.pad(values, ((0, 0), (0, -len(steps) % together)), constant_values=np.nan)
    stacks = np.ma.masked_invalid(padded.reshape(len(values), -1, together))
    return stacks.mean(axis=2).filled(np.nan), edges


def _top(counts: Floats) -> float:
    return float(np.nanmax(counts, initial=0.0)) or 1.0


def _dead_title(shares: pd.DataFrame) -> str:
    last = shares.ffill(axis=1).iloc[:, -1] if shares.size else pd.Series(dtype=float)
    if last.isna().all():
        return "Near-zero activations: nothing recorded yet; a fit does, learn.fit(1, cbs=recorder)"
    worst, dead = shortened(str(last.idxmax()) or "(model)"), (last > DEAD_FROM).sum()
    at_end = f"at the end {dead} above {DEAD_FROM:.0%}, the most in {worst}: {last.max():.0%}"
    return f"Near-zero activations of {len(shares)} layers; {at_end}"
