"""What all figures have in common: paper, ink, scales, names, and the marks of time.

Figures are pyplot's, as fastai's are: a notebook shows each at the end of its cell, and `plt.show()` in a script.
`rcParams` are left alone, and colours are explicit, so that a figure looks the same in a dark notebook.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, SymmetricalLogLocator

from fastai_lsuv.plots.palette import GREY, INK, PALE

__all__ = [
    "Bools",
    "Floats",
    "finish",
    "legend",
    "mark_epochs",
    "mark_level",
    "new_figure",
    "scale_accuracy",
    "scale_mean",
    "scale_std",
    "shortened",
]

LOG_FROM = 8.0  # a std that spans more than this factor is drawn on a log axis
FEW_DECADES = 100.0  # up to this factor, a log axis has ticks at 1, 2 and 5
SYMLOG_FROM = 10.0  # a mean farther out than this many units is drawn on a symlog axis
MAX_NAME = 24  # characters shown of a layer's name
MAX_EPOCHS = 20  # marks of epochs and fits on one axis

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class _Figure(Figure):
    """A figure of pyplot's that a notebook shows once, and that looks the same in any style."""

    def _ipython_display_(self) -> None:
        """Show it and close it, as a cell's value or at the cell's end: whichever comes first is the only time."""
        if "inline" not in plt.get_backend():
            raise NotImplementedError  # IPython then does as with any figure, which may be in a window
        ipython = sys.modules["IPython"].display
        ipython.display(ipython.Image(self.as_png()))
        plt.close(self)

    def as_png(self) -> bytes:
        """The figure as an image."""
        png = BytesIO()
        self.savefig(png, format="png", bbox_inches="tight")
        return png.getvalue()

    def add_subplot(self, *args: Any, **options: Any) -> Any:
        """As any figure's, but without the dashes and markers of a user's cycle of styles."""
        ax = super().add_subplot(*args, **options)
        ax.set_prop_cycle(color=[INK])
        return ax

    def savefig(self, fname: Any, **options: Any) -> None:
        """As any figure's, but on its own paper, whatever `rcParams["savefig.facecolor"]` says: the ink is dark."""
        super().savefig(fname, **{"facecolor": self.get_facecolor(), **options})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of pyplot's, in inches."""
    return plt.figure(figsize=(width, height), layout="constrained", facecolor="white", FigureClass=_Figure)


def finish(fig: Figure, title: str) -> None:
    """Set the title and all the colours that a user's style would set otherwise; logarithmic axes say so."""
    fig.suptitle(title, x=0.01, ha="left", fontweight="bold")
    for ax in fig.axes:
        _name_scale(ax.xaxis)
        _name_scale(ax.yaxis)
        ax.set_facecolor("white")
        ax.grid(visible=False)
        if ax.lines and not ax.images:  # neither an image nor a colour bar
            ax.grid(visible=True, axis="y", color=PALE, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(which="both", colors=INK)
        ax.spines[:].set_color(INK)
        ax.spines[["top", "right"]].set_visible(False)
    for text in fig.findobj(Text):
        text.set_color(INK)


def _name_scale(axis: Axis) -> None:
    """Behind the axis's label, if it has one."""
    label, scale = axis.get_label_text(), axis.get_scale()
    if label and scale == "log":
        axis.set_label_text(f"{label} (log)")
    elif label and scale == "symlog":
        transform: Any = axis.get_transform()
        axis.set_label_text(f"{label}\n(log beyond ±{transform.linthresh:g})")


def legend(ax: Axes, columns: int = 5) -> None:
    """Above the axes, where it covers no curve."""
    at: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    ax.legend(ncols=columns, frameon=False, columnspacing=1.2, **at)


def mark_level(ax: Axes, y: float, label: str, dash: str = "--") -> None:
    """A line across the axes, at what was wanted, or at chance."""
    ax.axhline(y, color=INK, linestyle=dash, linewidth=1.0, label=label, zorder=1)


def scale_accuracy(ax: Axes, chance: float) -> None:
    """From 0 to 100%, with a line at the accuracy of a blind guess."""
    mark_level(ax, chance, "chance", dash=":")
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def scale_std(ax: Axes, stds: npt.ArrayLike, wanted: float | None = None) -> None:
    """Log where the values span more than a linear axis can show."""
    shown = np.append(_finite(stds), wanted or [])
    shown = shown[shown > 0]
    if shown.size and shown.max() > LOG_FROM * shown.min():
        ax.set_yscale("log", nonpositive="mask")
        if shown.max() < FEW_DECADES * shown.min():
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.margins(y=0.1)  # room for the triangles
    else:
        ax.set_ylim(0, 1.15 * shown.max(initial=0.0) or 1.0)


def scale_mean(ax: Axes, means: npt.ArrayLike, center: float, unit: float) -> None:
    """Symlog where one layer's mean would press all the others flat; and rounding errors aren't to fill the axis."""
    farthest = np.abs(_finite(means) - center).max(initial=0.0) / unit
    if farthest > SYMLOG_FROM:
        threshold = 10.0 ** np.ceil(np.log10(unit))  # a tick's place: ticks nearer to 0 would stand on one another
        ax.set_yscale("symlog", linthresh=threshold, linscale=max(2.0, np.log10(farthest) / 4))
        ticks = SymmetricalLogLocator(base=10.0, linthresh=threshold)
        ticks.set_params(numticks=8)
        ax.yaxis.set_major_locator(ticks)
        ax.margins(y=0.1)
    else:
        ax.update_datalim([(0, center - 0.01 * unit), (0, center + 0.01 * unit)])


def _finite(values: npt.ArrayLike) -> Floats:
    array: Floats = np.asarray(values, float)
    return array[np.isfinite(array)]


def shortened(name: str, most: int = MAX_NAME) -> str:
    """The name without its middle: its beginning tells the stage, its end the layer."""
    if len(name) <= most:
        return name
    head = most // 3
    return f"{name[:head]}…{name[head + 1 - most :]}"


def mark_epochs(ax: Axes, records: pd.DataFrame, numbered: bool = True, most: int = MAX_EPOCHS) -> None:
    """A line where an epoch begins, a stronger one where a fit begins, and their numbers above.

    Reads the columns `fit`, `epoch` and `step`. Where there are more than an axis has room for, fits go first.
    """
    starts = records.groupby(["fit", "epoch"])["step"].min().reset_index().sort_values("step")
    starts["begins"] = starts["fit"].diff().ne(0)
    room = max(np.ptp(records["step"]), 1) / most if len(records) else 1
    kept: list[float] = []
    fits_first = starts.sort_values("begins", ascending=False, kind="stable")
    for step, begins in zip(fits_first["step"].to_numpy(float), fits_first["begins"], strict=True):
        if all(abs(step - other) >= room for other in kept):
            kept.append(step)
            ax.axvline(step, color=GREY, linewidth=1.2 if begins else 0.6, alpha=0.7, zorder=1.5)
    if numbered and kept:
        shown = starts[starts["step"].isin(kept)]
        _number(ax, "epoch", shown["step"], shown["epoch"], row=0)
        if starts["fit"].nunique() > 1:
            shown = shown[shown["begins"]]
            _number(ax, "fit", shown["step"], shown["fit"], row=1)


def _number(ax: Axes, what: str, steps: Iterable[float], numbers: Iterable[int], row: int) -> None:
    """One row of numbers above the axes, with its name in front."""
    up = 6 + 11 * row
    text: dict[str, Any] = {"textcoords": "offset points", "va": "bottom", "fontsize": "small"}
    ax.annotate(what, (0, 1), (-10, up), xycoords="axes fraction", ha="right", annotation_clip=False, **text)
    for step, number in zip(steps, numbers, strict=True):
        ax.annotate(str(number), (step, 1), (0, up), xycoords=ax.get_xaxis_transform(), ha="center", **text)
