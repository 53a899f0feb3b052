"""Frames in, figures out: how the statistics of activations move over the steps of training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastai_lsuv.plots.names import BOTTOM, MAX_NAME, TOP, Style, is_beyond, name_ends
from fastai_lsuv.plots.style import PALE, Floats, finish, mark_epochs, new_figure, scale_mean, scale_std, shortened

__all__ = ["plot_layer", "plot_runs", "plot_stats"]

LABELS = {
    "mean": "mean of the output",
    "std": "std of the output",
    "near_zero": "share near zero",
    "signal": "signal: part of the std\nthat is due to the input",
    "dead_units": "dead units of the epoch",
    "update": "update: change per step\nbeside the weight",
    "grad_mean": "mean of the gradient",
    "grad_std": "std of the gradient",
}
OF_ONE = {  # of one layer only
    "sparsity": "share near zero\nbeside the std",
    "at_limit": "share at the limit\nof the range",
}
SHARES = ("near_zero", "signal", "dead_units", *OF_ONE)

# Okabe and Ito's palette without its yellow, ordered so that those of one dash differ for all colour-blind eyes.
COLORS = ("#0072B2", "#D55E00", "#333333", "#009E73", "#56B4E9", "#CC79A7", "#E69F00")
DASHES = ("-", "--", "-.")
WORKS = "#E3F1E7"  # where updates are known to work
ALWAYS = ("mean", "std", "near_zero")  # have a panel even if there is nothing to draw
MAX_NAMED = 10  # layers that each have a colour and a name of their own; more are coloured by depth
DEPTHS = ("viridis", 0.0, 0.8)  # even to the eye and to colour-blind eyes; its end is too pale for white paper
MAX_TICKS = 12  # names beside the colour bar
MAX_POINTS = 250  # of one curve; of more records, it shows the medians of stretches

Tables = dict[str, pd.DataFrame]  # a row a step, a column a layer: "valid", "train", and its "lowest" and "highest"


def plot_stats(
    frame: pd.DataFrame,  # tidy: `fit, epoch, step, phase, layer, mean, std, near_zero`, perhaps `signal, update, …`
    activations: Collection[str] = (),  # layers that have no parameters: of many layers, a column of their own
    band: tuple[float, float] | None = None,  # of updates that are known to work
) -> Figure:
    """Draw what was recorded of each layer's output over the steps of training, a panel a quantity.

    A row is one record of one layer; layers stand in the order in which they first appear. Up to ten are told apart by
    colour and dash and named where they end; more are coloured by depth, and in each panel the highest and the lowest
    are named. Of more than 250 records, medians of stretches are drawn, with a band from the lowest to the highest (of
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
    band: tuple[float, float] | None = None,
) -> Figure:
    """Draw `plot_stats` of several runs of one network side by side, on one scale."""
    layers = list(dict.fromkeys(layer for frame in frames.values() for layer in frame["layer"].unique()))
    fig = _grid(_by_kind(frames, activations), layers, band)
    finish(fig, f"Activations of {len(layers)} layers")
    return fig


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


def _grid(columns: Mapping[str, pd.DataFrame], layers: Sequence[str], band: tuple[float, float] | None) -> Figure:
    """One column a frame, one row a quantity; a row has one scale."""
    tables = {title: _tables(frame, LABELS) for title, frame in columns.items()}
    values = {
        quantity: np.concatenate([_values(of_frame[quantity]) for of_frame in tables.values() if quantity in of_frame])
        for quantity in LABELS
        if any(quantity in of_frame for of_frame in tables.values())
    }
    quantities = [q for q in values if q in ALWAYS or not np.isnan(values[q]).all()]
    styles = dict(zip(layers, _styles(len(layers)), strict=True))
    width = 11.0 if len(columns) == 1 else 1.0 + 6.5 * len(columns)
    fig = new_figure(width, height=0.8 + 2.3 * len(quantities))
    grid = fig.subplots(len(quantities), len(columns), sharex=True, sharey="row", squeeze=False)
    for axes, (title, frame) in zip(grid.T, columns.items(), strict=True):
        for ax, quantity in zip(axes, quantities, strict=True):
            table = tables[title][quantity]
            of_frame = _of_frame(styles, table)
            _panel(ax, quantity, table, of_frame, values[quantity], band)
            mark_epochs(ax, frame, numbered=ax is axes[0])
            ax.set_visible(bool(of_frame) or len(columns) == 1)
        lowest = [ax for ax in axes if ax.get_visible()][-1]
        lowest.set_xlabel(_steps(frame))
        lowest.tick_params(labelbottom=True)
        if title:
            axes[0].set_title(title, pad=24, fontweight="bold")
    for axes, title in zip(grid.T, columns, strict=True):  # once all scales are settled
        for ax, quantity in zip(axes, quantities, strict=True):
            table = tables[title][quantity]
            curves = table["train"] if len(table["train"]) else table["valid"]
            name_ends(ax, curves, _of_frame(styles, table), MAX_NAMED)
    if len(layers) > MAX_NAMED:
        _depth_bar(fig, list(grid.flat), layers)
    return fig


def _of_frame(styles: dict[str, Style], table: Tables) -> dict[str, Style]:
    """Styles of the layers of which there is anything to draw."""
    known = {layer for phase in ("train", "valid") for layer in table[phase].columns[table[phase].notna().any()]}
    few = len(styles) <= MAX_NAMED
    return {layer: style for layer, style in styles.items() if layer in known or (few and layer in table["train"])}


def _values(table: Tables) -> Floats:
    return np.concatenate([phase.to_numpy(float).ravel() for phase in table.values()])


def plot_layer(
    frame: pd.DataFrame,  # as for `plot_stats`
    name: str,  # the layer
    band: tuple[float, float] | None = None,  # of updates that are known to work
) -> Figure:
    """Draw the statistics of one layer's output over the steps of training, side by side: fastai's `plot_layer_stats`.

    Raises `ValueError` if the frame has no layer of that name.
    """
    rows = frame[frame["layer"] == name]
    if rows.empty:
        raise ValueError(f"no records of a layer {name!r}; there are {', '.join(map(repr, frame['layer'].unique()))}")
    found = _tables(rows, LABELS | OF_ONE)
    tables = {q: table for q, table in found.items() if q in ALWAYS or not np.isnan(_values(table)).all()}
    per_row = len(tables) if len(tables) <= 5 else -(-len(tables) // 2)
    fig = new_figure(width=1.0 + 3.8 * per_row, height=3.6 * -(-len(tables) // per_row))
    axes = list(fig.subplots(-(-len(tables) // per_row), per_row, squeeze=False).flat)
    for ax in axes[len(tables) :]:
        ax.remove()
    for ax, (quantity, table) in zip(axes, tables.items(), strict=False):
        _panel(ax, quantity, table, {name: _styles(1)[0]}, _values(table), band)
        mark_epochs(ax, rows)
    fig.supxlabel(_steps(rows), fontsize="medium")
    finish(fig, _title(rows, name or "(model)"))
    return fig


def _tables(frame: pd.DataFrame, quantities: Iterable[str]) -> dict[str, Tables]:
    """What is drawn of each of these quantities that is in the frame."""
    layers = list(frame["layer"].unique())
    tables = {}
    for quantity in quantities:
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


def _panel(
    ax: Axes,
    quantity: str,
    table: Tables,
    styles: dict[str, Style],
    values: Floats,  # of all panels that are to have the same scale
    band: tuple[float, float] | None,
) -> None:
    """The curves of one quantity, on the scale that it needs."""
    _scale(ax, quantity, values, band)
    named = all(color in COLORS for color, _ in styles.values())
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
    ax.set_ylabel((LABELS | OF_ONE)[quantity])


def _scale(ax: Axes, quantity: str, values: Floats, band: tuple[float, float] | None) -> None:
    if quantity in SHARES:
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif quantity == "update":
        _scale_update(ax, values, band)
    elif quantity.endswith("std"):
        scale_std(ax, values)
    else:
        unit = 1.0 if quantity == "mean" else float(np.nanmedian(np.abs(values))) or 1.0
        scale_mean(ax, values, center=0.0, unit=unit)
    if quantity.startswith("grad") and ax.get_yscale() == "linear":
        ax.yaxis.set_major_formatter("{x:.4g}")


def _scale_update(ax: Axes, values: Floats, band: tuple[float, float] | None) -> None:
    """On a log axis, with the band that is known to work."""
    ax.set_yscale("log", nonpositive="mask")
    shown = values[np.isfinite(values) & (values > 0)]
    if band is not None:
        ax.axhspan(*band, color=WORKS, linewidth=0, zorder=0)
        shown = np.append(shown, band)
    if len(shown):
        ax.set_ylim(shown.min() / 3, shown.max() * 3)


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
        return "Activations: nothing recorded yet; a fit with this recorder does, learn.fit(1, cbs=recorder)"
    records = frame["step"].nunique()
    shown = f"Activations of {of}, {records} records" if records > 1 else f"Activations of {of}, one record"
    finite = np.isfinite(frame[["mean", "std"]].to_numpy(float)).all(axis=1)
    broken = frame[frame["near_zero"].notna() & ~finite].nsmallest(1, "step")
    if broken.empty:
        return shown
    step, layer = broken[["step", "layer"]].to_numpy()[0]
    return f"{shown}; first not finite at step {step}, in {shortened(layer)}"
