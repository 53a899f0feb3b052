"""What `lsuv_` found and did: rows, table, frame, figure."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, overload

import pandas as pd

from fastai_lsuv.core.signal import SIGNAL_LOST
from fastai_lsuv.plots.layers import plot_report
from fastai_lsuv.summary import judged, number, summary_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastai_lsuv.learner.guards import Decision

_WORDS = "status", "reason"
STATUSES = ("corrected", "unchanged", "skipped", "not_converged")


@dataclass(frozen=True)
class Row:
    """One layer or block: plain names and numbers; NaN where there is nothing to measure."""

    name: str  # qualified name in the model; "" for the model itself
    type: str  # name of its class
    n_calls: int  # forward calls in one pass
    mean_before: float  # in the untouched network, over all calls; with `per_channel`, of the channel farthest off
    std_before: float  # likewise
    mean_after: float  # in a clean pass through the finished network
    std_after: float  # likewise
    n_iter: int  # number of corrections made
    status: str  # corrected, unchanged (already on target), skipped, not_converged
    reason: str  # why, in one or several fixed phrases, separated by "; "; empty if there is nothing to say
    signal_before: float = math.nan  # share of the std that is due to the input, 0 to 1; at 0 all inputs look the same
    signal_after: float = math.nan  # the same, in the finished network
    spread_after: float = math.nan  # 1 - 1 / number of directions in which outputs differ: 0 if all lie on one line
    grad_after: float = math.nan  # elasticity: if this output changes by 1%, the network's changes by this many percent

    @property
    def notes(self) -> set[str]:
        """The phrases of the reason, without the names of weights that follow them."""
        return {note.partition(": ")[0] for note in self.reason.split("; ")}


class LSUVReport(Sequence[Row]):
    """What `lsuv_` measured and did: rows in execution order, by index or by name (`report["0.3.conv"]`).

    A report holds only numbers and names, so its pickle is small and it keeps no model or tensor alive. It records what
    algorithm 1 of Mishkin & Matas (2016, arXiv:1511.06422) measures and changes.

    Raises:
        KeyError: no layer has this name.
        IndexError: there are fewer rows.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastai_lsuv import lsuv_
        >>> report = lsuv_(nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 5)), torch.randn(64, 20))
        >>> len(report), report[0].type, report["2"].status, report.converged
        (2, 'Linear', 'corrected', True)
        >>> report.to_frame()[["name", "std_after"]].round(3)
          name  std_after
        0    0        1.0
        1    2        1.0
        >>> print(report.summary())  # doctest: +ELLIPSIS
        LSUV: 2 corrected; worst mean ...
        >>> figure = report.plot()
    """

    _decision: Decision | None = None  # that the model has had LSUV, where a Learner keeps the report

    def __init__(
        self,
        rows: Sequence[Row],  # one per layer, in execution order
        n_forward: int,  # how often the model ran, including passes on a few samples
        seconds: float,  # wall-clock time of everything
        mean: float | None = 0.0,  # target mean
        std: float | None = 1.0,  # target standard deviation
        verdict: str = "healthy",  # whether the network can be trained, by signal and gradient
        remedy: str = "",  # what to do about the verdict
        init: str = "",  # what `init="auto"` did, and why
    ) -> None:
        self.rows, self.n_forward, self.seconds, self.mean, self.std = tuple(rows), n_forward, seconds, mean, std
        self.verdict, self.remedy, self.init = verdict, remedy, init

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_decision"}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, key: int | str) -> Row: ...

    @overload
    def __getitem__(self, key: slice) -> Sequence[Row]: ...

    def __getitem__(self, key: int | str | slice) -> Row | Sequence[Row]:
        if not isinstance(key, str):
            return self.rows[key]
        for row in self.rows:
            if row.name == key:
                return row
        raise KeyError(f"{key!r}: no such layer; there are {', '.join(repr(row.name) for row in self.rows)}")

    def __contains__(self, key: object) -> bool:
        return key in self.rows or any(row.name == key for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def converged(self) -> bool:  # False if any row's status is `not_converged`
        """Whether every layer that wasn't skipped has the target mean and std."""
        return all(row.status != "not_converged" for row in self.rows)

    def to_frame(self) -> pd.DataFrame:  # one row per layer, the columns of `Row`
        """Return all rows as a pandas DataFrame."""
        return pd.DataFrame([asdict(row) for row in self.rows], columns=[f.name for f in fields(Row)])

    def plot(self) -> Figure:  # a notebook shows it; `savefig` saves it
        """Plot the std, mean and signal of each layer's output, before and after, and how a gradient travels back."""
        return plot_report(self.to_frame(), self.mean, self.std, judged(self), SIGNAL_LOST)

    def summary(self) -> str:  # one line
        """Return the counts, what was skipped and why, worst mean and std before → after, seconds, and the verdict."""
        return summary_line(self)

    def _table(self) -> pd.DataFrame:
        """Return the frame as text, for printing, with the words last."""
        frame = self.to_frame()
        frame = frame[[*frame.columns.drop(list(_WORDS)), *_WORDS]]
        for column in frame.select_dtypes("float"):
            frame[column] = [number(x) for x in frame[column]]
        return frame.rename(columns={"n_calls": "calls", "n_iter": "steps"}).astype(str)

    def __repr__(self) -> str:
        if not self.rows:
            return self.summary()
        table = self._table()
        for column in ("name", "type", "status", "reason"):  # pandas aligns to the right
            width = max(map(len, [column, *table[column]]))
            table[column] = table[column].str.ljust(width)
            table = table.rename(columns={column: column.ljust(width)})
        lines = table.to_string(index=False).split("\n")
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])

    def _repr_html_(self) -> str:
        return f"{self._table().to_html(index=False)}<p>{html.escape(self.summary())}</p>"
