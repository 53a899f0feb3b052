"""Frames in, figures out: one panel, with the curves of one quantity over the steps of training."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastai_lsuv.plots.names import BOTTOM, TOP, Style, is_beyond
from fastai_lsuv.plots.palette import PALE, by_order
from fastai_lsuv.plots.style import Floats, scale_mean, scale_std

__all__ = ["LABELS", "MAX_NAMED", "MAX_POINTS", "OF_ONE", "Tables", "panel", "per_point", "styles", "tables", "values"]

LABELS = {
    "mean": "mean of the output",
    "std": "std of the output",
    "near_zero": "share near zero",
    "signal": "signal: share of the std\nthat is due to the input",
    "dead_units": "dead units: share that\ndid not fire in the epoch",
    "update": "update: size of a step\nrelative to the weight",
    "grad_mean": "mean of the gradient",
    "grad_std": "std of the gradient",
}
OF_ONE = {  # of one layer only
    "sparsity": "share near zero,\nrelative to the std",
    "at_limit": "share at the limit\nof the range",
}
SHARES = ("near_zero", "signal", "dead_units", *OF_ONE)
ALWAYS = ("mean", "std", "near_zero")  # have a panel even if there is nothing to draw

DASHES = ("-", "--", "-.")
WORKS, BAND = "#E3F1E7", ";\ngreen: known to work"
MAX_NAMED = 10  # layers that each have a dash and a name of their own
MAX_POINTS = 250  # of one curve; of more records, it shows the medians of stretches

Tables = dict[str, pd.DataFrame]  # a row a step, a column a layer: "valid", "train", and its "lowest" and "highest"


# --- what is drawn ----------------------------------------------------------------------------------------------------


def tables(frame: pd.DataFrame, quantities: Iterable[str]) -> dict[str, Tables]:
    """What is drawn of each of these quantities that is in the frame."""
    layers = list(frame["layer"].unique())
    found = {}
    for quantity in quantities:
        if quantity in frame:
            train, valid = (
                rows.pivot_table(index="step", columns="layer", values=quantity, dropna=False).reindex(columns=layers)
                for rows in (frame[frame["phase"] == phase] for phase in ("train", "valid"))
            )
            found[quantity] = {"valid": valid, **_stretches(train)}
    return {q: table for q, table in found.items() if q in ALWAYS or not np.isnan(values(table)).all()}


def values(table: Tables) -> Floats:
    """All of a quantity."""
    return np.concatenate([phase.to_numpy(float).ravel() for phase in table.values()])


def _stretches(train: pd.DataFrame) -> Tables:
    """Medians of stretches of records, where there are more than can be told apart, and what they lie between."""
    together = per_point(len(train))
    if together == 1:
        return dict.fromkeys(("train", "lowest", "highest"), train)
    stretch = np.arange(len(train)) // together
    steps = train.index.to_series().groupby(stretch).mean()
    stretches = train.groupby(stretch)
    pooled = {"train": stretches.median(), "lowest": stretches.min(), "highest": stretches.max()}
    return {name: table.set_axis(steps, axis=0) for name, table in pooled.items()}


def per_point(records: int) -> int:
    """How many of so many records one point of a curve stands for."""
    return -(-records // MAX_POINTS) or 1


# --- how --------------------------------------------------------------------------------------------------------------


def styles(n: int) -> list[Style]:
    """A colour and a dash for each of n layers: dark in front, light at the end; few are told apart by dashes, too."""
    dashes = DASHES if n <= MAX_NAMED else ("-",)
    return [(color, dashes[i % len(dashes)]) for i, color in enumerate(by_order(n))]


def panel(
    ax: Axes,
    quantity: str,
    table: Tables,
    looks: dict[str, Style],  # of the layers
    shown: Floats,  # the values of all panels that are to have the same scale
    band: tuple[float, float] | None,  # of updates that are known to work
    named: bool = True,  # whether layers are told apart one by one
) -> None:
    """Draw the curves of one quantity, on the scale that it needs."""
    _scale(ax, quantity, shown, band)
    width, size = (1.5, 4.5) if named else (0.9, 2.5)
    if not named and not table["lowest"].equals(table["highest"]):
        _band(ax, table["lowest"].min(axis=1), table["highest"].max(axis=1), PALE)
    for layer, (color, dash) in looks.items():
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
    ax.set_ylabel((LABELS | OF_ONE)[quantity] + BAND * (quantity == "update" and band is not None))


def _scale(ax: Axes, quantity: str, shown: Floats, band: tuple[float, float] | None) -> None:
    if quantity in SHARES:
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif quantity == "update":
        _scale_update(ax, shown, band)
    elif quantity.endswith("std"):
        scale_std(ax, shown)
    else:
        unit = 1.0 if quantity == "mean" else float(np.nanmedian(np.abs(shown))) or 1.0
        scale_mean(ax, shown, center=0.0, unit=unit)
    if quantity.startswith("grad") and ax.get_yscale() == "linear":
        ax.yaxis.set_major_formatter("{x:.4g}")


def _scale_update(ax: Axes, shown: Floats, band: tuple[float, float] | None) -> None:
    """On a log axis, with the band that is known to work."""
    ax.set_yscale("log", nonpositive="mask")
    shown = shown[np.isfinite(shown) & (shown > 0)]
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
    for edge, height, triangle in ((highest, TOP, "^"), (lowest, BOTTOM, "v")):
        beyond = is_beyond(ax, edge, height)
        x = np.asarray(edge.index)[beyond & ~np.append(False, beyond[:-1])]
        heights = np.full(len(x), height)
        ax.plot(x, heights, triangle, color=color, markersize=6, transform=ax.get_xaxis_transform())
