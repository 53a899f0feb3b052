"""What `lsuv_` found and did: rows, table, frame, figure."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import TYPE_CHECKING, Any, overload

import pandas as pd

from fastai_lsuv.core.reasons import Note
from fastai_lsuv.plots.layers import plot_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastai_lsuv.learner.guards import Decision

STATUSES = ("corrected", "unchanged", "skipped", "not_converged")
_MEAN_KEPT = {Note.NO_BIAS.value, Note.ONE_SIGN.value, Note.PRIOR.value}
_TOLD = {Note.OTHERS.value: "", Note.BIAS_MOVED.value: " (exclude= leaves it)"}  # of layers that are right, too


@dataclass(frozen=True)
class Row:
    """One layer or block: plain names and numbers; NaN where there is nothing to measure."""

    name: str  # qualified name in the model, "" for the model itself
    type: str  # class name
    n_calls: int  # forward calls in one pass
    mean_before: float  # of the untouched network on the batch, over all calls; per channel: of the farthest channel
    std_before: float  # the same
    mean_after: float  # of a clean pass through the finished network
    std_after: float  # the same
    signal_before: float  # share of the std that is due to the input, 0 to 1: at 0 all inputs look the same
    signal_after: float  # the same of the finished network
    grad_after: float  # elasticity: a change of the output by 1 % changes the network's by so many per cent
    n_iter: int  # corrections made
    status: str  # corrected, unchanged (was there already), skipped, not_converged
    reason: str  # why, in a fixed phrase (or several, with "; " between them), where there is something to say

    @property
    def notes(self) -> set[str]:
        """The phrases that the reason consists of, without the names of weights behind them."""
        return {note.partition(": ")[0] for note in self.reason.split("; ")}


class LSUVReport(Sequence[Row]):
    """Rows in execution order, also by name: `report[0]`, `report["0.3.conv"]`.

    Holds numbers and names only, so that it pickles small and keeps no model or tensor alive. `lsuv_` makes it, of what
    algorithm 1 of Mishkin & Matas (2016, arXiv:1511.06422) looks at and does.

    Raises:
        KeyError: a name that no layer has.
        IndexError: a number beyond the last row.

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
        LSUV: 2 of 2 layers right, worst mean ...
        >>> figure = report.plot()
    """

    _decision: Decision | None = None  # that the model has had LSUV, where a Learner keeps the report

    def __init__(
        self,
        rows: Sequence[Row],  # one per layer, in execution order
        n_forward: int,  # passes of the whole model that were made
        seconds: float,  # wall time of all
        mean: float | None = 0.0,  # wanted mean
        std: float | None = 1.0,  # wanted standard deviation
        verdict: str = "healthy",  # whether the network can be trained, by signal and gradient
        remedy: str = "",  # what to do about that
        init: str = "",  # of `init="auto"`: what was taken, and why
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
    def converged(self) -> bool:  # False: a row's status is `not_converged`
        """Whether every layer that wasn't skipped has the wanted mean and std."""
        return all(row.status != "not_converged" for row in self.rows)

    def to_frame(self) -> pd.DataFrame:  # one row per layer, the columns of `Row`
        """All rows, for pandas."""
        return pd.DataFrame([asdict(row) for row in self.rows], columns=[f.name for f in fields(Row)])

    def plot(self) -> Figure:  # of matplotlib
        """Draw the mean and standard deviation of every layer, before beside after."""
        return plot_report(self.to_frame(), mean=self.mean, std=self.std)

    def summary(self) -> str:  # one line
        """How many layers, worst mean and std before → after, seconds, what was skipped and why."""
        if not self.rows:
            return f"LSUV: nothing to correct, {self.seconds:.2f} s"
        done = [row for row in self.rows if row.status != "skipped"]
        only_measured = self.mean is None and self.std is None
        right = [row for row in done if row.status != "not_converged"]
        parts = [f"LSUV: {len(right)} of {len(self.rows)} layers {'measured' if only_measured else 'right'}"]
        if done:
            for what, asked, wanted in (("mean", self.mean, self.mean or 0.0), ("std", self.std, self.std or 1.0)):
                excused = _MEAN_KEPT if what == "mean" else {Note.ENDS_BRANCH.value}
                judged = [row for row in done if not excused & row.notes]
                if not judged or (asked is None and not only_measured):  # what was left alone isn't right or wrong
                    continue
                before, after = (_farthest(judged, f"{what}_{when}", wanted) for when in ("before", "after"))
                parts.append(f"worst {what} {before}" if only_measured else f"worst {what} {before} → {after}")
        if at_end := [row for row in done if Note.ENDS_BRANCH.value in row.notes]:
            usual = median(row.std_after for row in at_end)
            parts.append(f"{len(at_end)} that end a branch {_farthest(at_end, 'std_after', usual)}")
        parts.append(f"{self.seconds:.2f} s")
        init = [f'init="auto" took {self.init}'] if self.init else []
        return "; ".join([", ".join(parts), *self._left(), *init, self._judged()])

    def _judged(self) -> str:
        """The verdict, and what to do."""
        return f"{self.verdict} ({self.remedy})" if self.remedy else self.verdict

    def _left(self) -> list[str]:
        """What isn't as wanted, by reason."""
        groups = defaultdict(list)
        for row in self.rows:
            if row.status in ("skipped", "not_converged"):
                groups[row.status.replace("_", " "), row.reason].append(row.name or row.type)
        told = defaultdict(list)
        for row in self.rows:
            for note in row.reason.split("; ") if row.status != "skipped" else ():
                if (phrase := note.partition(": ")[0]) in _TOLD:
                    told[note.replace(": ", " (") + ")" * (": " in note) + _TOLD[phrase]].append(row.name or row.type)
        left = [
            f"{len(names)} {status}{f' ({reason})' if reason else ''}: {few(names)}"
            for (status, reason), names in groups.items()
        ]
        return left + [f"{note} in {len(names)}: {few(names)}" for note, names in told.items()]

    def _table(self) -> pd.DataFrame:
        """The frame as text, for printing."""
        frame = self.to_frame()
        for column in frame.select_dtypes("float"):
            frame[column] = [_number(x) for x in frame[column]]
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


def _number(x: float) -> str:
    if math.isnan(x):
        return "-"
    return f"{x:.4f}" if 1e-3 <= abs(x) < 1e4 or x == 0 else f"{x:.1e}"


def _farthest(rows: Sequence[Row], column: str, wanted: float) -> str:
    """The value that is farthest from the wanted one."""
    values = [getattr(row, column) for row in rows]
    return _number(max(values, key=lambda x: abs(x - wanted) if not math.isnan(x) else float("inf")))


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many there are beyond."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
