"""What was recorded of the layers over a training: a bounded store, its frame, and a verdict on each layer."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from fastai_lsuv.recording.verdicts import Facts, verdicts

Floats = npt.NDArray[np.floating]
INDEX = ("fit", "epoch", "step", "phase")
# Of all training records: extremes of the std and the near-zero share; of those of the last fit, sums of the updates.
_RUNNING = ("first_std", "last_std", "min_std", "max_std", "max_near_zero", "sum_update", "n_changes", "n_updates")
_OF_FIT = _RUNNING.index("sum_update")  # from here on
# A terminal that is too narrow shows the first and the last columns.
_SHOWN = (
    "verdict", "type", "first_std", "last_std", "min_std", "max_std", "max_near_zero", "last_mean", "dead_units",
    "last_update", "signal", "because",
)  # fmt: skip


class Layer(NamedTuple):
    """What a reader wants to know of a layer besides its numbers."""

    type: str
    is_known: bool  # what it does: otherwise it may be one that hands on what it gets
    has_parameters: bool = True
    has_matrix: bool = True  # a parameter of more than one dimension


class Record(NamedTuple):
    """Statistics of all layers in one batch."""

    fit: int  # number of the fit, from 0
    epoch: int  # in the fit
    step: int  # training batches before this one, over all fits
    phase: str  # train, valid
    values: Floats  # (layers, columns); NaN for a layer that didn't run


class History:
    """Records of several fits, `max_records` at most.

    When it is full every other old record is dropped, so that the spacing doubles; never the newest. The summary's
    extremes are those of all training records ever made.
    """

    def __init__(
        self,
        max_records: int,  # kept at most
        columns: Sequence[str],  # of a record's values: `mean`, `std`, `near_zero`, …; several may be `hist`
    ) -> None:
        self.max_records, self.columns = max_records, tuple(columns)
        self.names: list[str] = []
        self.layers: dict[str, Layer] = {}
        self.records: list[Record] = []
        self._numbers: list[int] = []  # of each record, among all of its phase
        self._made: Counter[str] = Counter()  # records ever made, by phase
        self._spacing = 1
        self._running: Floats = np.empty((0, len(_RUNNING)))
        self._latest: Floats = np.empty((0, len(self.columns)))
        self._last: tuple[int, int] | None = None  # fit and epoch of the latest training record
        self._dead: Floats = np.empty((0, 1))  # units that were dead at the end of the last epoch

    def add_layers(self, layers: Mapping[str, Layer]) -> list[int]:
        """Make room for layers; returns the place of each in a record's values, the old one of a known name."""
        self.layers |= layers
        self.names = [*self.layers]
        tables = (self._running, self._latest, self._dead)
        self._running, self._latest, self._dead = (_padded(table, len(self.names)) for table in tables)
        return [self.names.index(name) for name in layers]

    def start_over(self) -> None:
        """Another model is judged by its own records only."""
        tables = (self._running, self._latest, self._dead)
        self._running, self._latest, self._dead = (np.full_like(table, np.nan) for table in tables)

    def placed(self, values: Floats, places: Sequence[int]) -> Floats:
        """Values of some layers in their places among all."""
        table = np.full((len(self.names), values.shape[1]), np.nan, values.dtype)
        table[list(places)] = values
        return table

    def add(self, record: Record) -> None:
        """Store one record, and drop others if there are too many."""
        if record.phase == "train":
            self._begin(record)
            self._note(record.values)
        if self.records and self._numbers[-1] % self._spacing:  # it was held as the newest only
            self.records.pop()
            self._numbers.pop()
        self.records.append(record)
        self._numbers.append(self._made[record.phase])
        self._made[record.phase] += 1
        while len(self.records) > self.max_records:
            self._thin_out()

    def _thin_out(self) -> None:
        self._spacing *= 2
        *old, newest = range(len(self.records))
        old = [i for i in old if self._numbers[i] % self._spacing == 0]
        kept = [*old[: self.max_records - 1], newest]
        self.records, self._numbers = [self.records[i] for i in kept], [self._numbers[i] for i in kept]

    def _begin(self, record: Record) -> None:
        """Keep what an epoch has shown where this record begins another, and sum updates anew where it begins a fit."""
        fit, epoch = self._last or (None, None)
        if (fit, epoch) != (record.fit, record.epoch):
            self._dead = self._latest[:, [self.columns.index("dead_units")]]
        if fit != record.fit:
            self._running[:, _OF_FIT:] = 0.0
        self._last = record.fit, record.epoch

    def _note(self, values: Floats) -> None:
        """Keep the running numbers up to date, and each layer's latest values."""
        names = ("mean", "std", "near_zero", "update")
        mean, std, near_zero, update = (values[:, self.columns.index(name)] for name in names)
        ran = ~np.isnan(near_zero)
        std = np.where(ran & ~np.isfinite(mean), np.inf, std)
        first, _, low, high, most, sum_update, n_changes, n_updates = self._running.T
        last = np.where(np.isnan(std), self._running[:, 1], std)
        first = np.where(np.isnan(first), std, first)
        extremes = (np.fmin(low, std), np.fmax(high, std), np.fmax(most, near_zero))
        changed = (update > 0) & np.isfinite(update)
        sums = sum_update + np.where(changed, update, 0.0), n_changes + changed
        self._running = np.stack([first, last, *extremes, *sums, n_updates + ~np.isnan(update)], 1)
        self._latest = np.where(ran[:, None], values, self._latest)

    # reading

    def place(self, layer: int | str) -> int:
        """The place of a layer, given by index or name.

        Raises:
            IndexError, KeyError: there is no such layer.
        """
        if isinstance(layer, str):
            if layer in self.names:
                return self.names.index(layer)
            near = difflib.get_close_matches(layer, self.names, n=1, cutoff=0.0)
            raise KeyError(f"{layer!r} is not recorded" + (f"; the nearest name is {near[0]!r}" if near else ""))
        if not -len(self.names) <= layer < len(self.names):
            raise IndexError(f"layer {layer}: there are {len(self.names)} layers")
        return range(len(self.names))[layer]

    def values(self, column: str, phase: str = "train") -> Floats:
        """One column of all records of a phase: (records, layers), or (records, layers, bins) of `hist`."""
        picked = [i for i, name in enumerate(self.columns) if name == column]
        table = self._stacked([record for record in self.records if record.phase == phase])[:, :, picked]
        return table if column == "hist" else table[:, :, 0]

    def index(self, phase: str) -> pd.DataFrame:
        """`fit`, `epoch` and `step` of all records of a phase."""
        rows = [record[:3] for record in self.records if record.phase == phase]
        return pd.DataFrame(rows, columns=list(INDEX[:3]))

    def frame(self, records: Sequence[Record] | None = None) -> pd.DataFrame:
        """One row a record (all of them, or those given) and layer that ran in it."""
        records = self.records if records is None else records
        table = self._stacked(records)
        ran = ~np.isnan(table[:, :, self.columns.index("near_zero")])
        at, layer = np.nonzero(ran)
        index = {name: np.array([getattr(record, name) for record in records])[at] for name in INDEX}
        visible = {name: table[:, :, i][ran] for i, name in enumerate(self.columns) if name != "hist"}
        return pd.DataFrame(index | {"layer": np.array(self.names, dtype=object)[layer]} | visible)

    def _stacked(self, records: Sequence[Record]) -> Floats:
        """(records, layers, columns); NaN where a layer wasn't there yet."""
        shape = (len(records), len(self.names), len(self.columns))
        return np.stack([_padded(r.values, len(self.names)) for r in records]) if records else np.empty(shape)

    def facts(self) -> dict[str, Facts]:
        """What is known of each layer that ran."""
        running = (dict(zip(_RUNNING, row, strict=True)) for row in self._running.tolist())
        latest = (dict(zip(self.columns, row, strict=True)) for row in self._latest.tolist())
        each = zip(self.layers.items(), running, latest, self._dead[:, 0].tolist(), strict=True)
        return {
            name: Facts(
                **layer._asdict(),
                **{key: of_all[key] for key in _RUNNING[:_OF_FIT]},
                **{key: last[key] for key in ("sparsity", "at_limit", "signal")},
                last_mean=last["mean"],
                last_update=last["update"],
                dead_units=float(np.fmin(last["dead_units"], dead)),
                mean_update=of_all["sum_update"] / max(of_all["n_changes"], 1),
                n_updates=int(of_all["n_updates"]),
            )
            for (name, layer), of_all, last, dead in each
            if not np.isnan(of_all["max_near_zero"])
        }

    def summary(self) -> pd.DataFrame:
        """One row for each layer that ran: its type, what is known of it, and a verdict with the reason."""
        facts = self.facts()
        found = verdicts([*facts.values()])
        rows = [vars(of_layer) | verdict._asdict() for of_layer, verdict in zip(facts.values(), found, strict=True)]
        table = pd.DataFrame(rows, index=pd.Index(facts, name="layer", dtype=object))
        return table.rename(columns={"name": "verdict"}).reindex(columns=_SHOWN)


def _padded(table: Floats, n: int) -> Floats:
    missing = np.full((n - len(table), table.shape[1]), np.nan, table.dtype)
    return np.concatenate([table, missing]) if len(missing) else table
