"""How a recorded history is read: frames, fastai's `ActivationStats` interface, figures."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from fastcore.foundation import L
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastai_lsuv.plots.curves import plot_layer, plot_runs, plot_stats
from fastai_lsuv.plots.maps import plot_dead, plot_hist, plot_hists
from fastai_lsuv.recording.description import HIST_RANGE
from fastai_lsuv.recording.history import Floats, History
from fastai_lsuv.recording.verdicts import WORKS


class Reading:
    """The reading half of `ActivationStatsRecorder`. A layer is given by its index in `layer_names`, or its name."""

    _history: History
    with_hist: bool

    def _flush(self) -> None:
        """Bring the history up to date."""

    @property
    def layer_names(self) -> list[str]:  # as in `named_modules`; empty before the first fit
        """Names of the layers in the model, in the order in which they are registered in it."""
        return list(self._history.names)

    def to_frame(self) -> pd.DataFrame:  # tidy: one record of one layer a row
        """All records held, one row per record and layer.

        `mean` and `std` of the output; `near_zero`, the share of it that is; `sparsity`, the share that is nearly zero
        beside the std; `at_limit`, the share of sizes near the largest; `signal`, the part of the std that is due to
        the input (the std over the batch at the same place, in the whole std); `update`, the size of the step's change
        of the layer's parameters beside their size, NaN where none trains; `dead_units`, the share of an activation's
        channels that have not fired yet in the epoch's recorded batches (with `every=1` in all of them), NaN of other
        layers. Of an activation that is a function only a ReLU's are known: in the row of the layer before it, from
        the second record of a fit on. With gradients also `grad_mean` and `grad_std`.

        `fit` counts from 0; `step` counts the training batches of all fits; `phase` is `train` or `valid`; a layer that
        did not run in a batch has no row.
        """
        self._flush()
        return self._history.frame()

    def summary(self) -> pd.DataFrame:  # by the layers' names
        """One row per layer that ran: its `type`; `first_std`, `last_std`, `min_std`, `max_std` and `max_near_zero` of
        all training records ever made; of its latest, `last_mean`, `signal`, `dead_units` (over the last epoch) and
        `last_update`; and a `verdict`, `because` of such a number: see `fastai_lsuv.recording.verdicts.verdicts`.
        """
        self._flush()
        return self._history.summary()

    # as fastai's `ActivationStats`: of training records

    @property
    def stats(self) -> L:  # of each training record an `L` of each layer's dictionary
        """All statistics, as `stats[record][layer]["std"]`; as of fastai's `ActivationStats`."""
        mean, std, near_zero = (column.tolist() for column in self._series())
        hists = torch.from_numpy(self._values("hist")) if self.with_hist else None
        return L(
            L(
                {"mean": mean[i][j], "std": std[i][j], "near_zero": near_zero[i][j]}
                | ({} if hists is None else {"hist": hists[i, j]})
                for j in range(len(self.layer_names))
            )
            for i in range(len(mean))
        )

    def layer_stats(
        self,
        layer: int | str,  # index in `layer_names`, or name
    ) -> L:  # of means, stds and near-zero shares, an `L` of each over the training records
        """Statistics of one layer over the training; as of fastai's `ActivationStats`.

        Raises:
            KeyError: no layer of that name is recorded.
            IndexError: there are fewer layers.
        """
        place = self._history.place(layer)
        return L(L(column[:, place].tolist()) for column in self._series())

    def hist(
        self,
        layer: int | str,  # index in `layer_names`, or name
    ) -> Tensor:  # (bins, training records)
        """Histograms of one layer over the training, as log(1 + count); as of fastai's `ActivationStats`.

        Raises:
            ValueError: recorded without `with_hist`.
            KeyError: no layer of that name is recorded.
            IndexError: there are fewer layers.
        """
        if not self.with_hist:
            raise ValueError("no histograms were recorded: create ActivationStatsRecorder with with_hist=True")
        place = self._history.place(layer)
        return torch.from_numpy(self._values("hist")[:, place]).t().float().log1p()

    def plot_layer_stats(
        self,
        layer: int | str,  # index in `layer_names`, or name
    ) -> Figure:  # of matplotlib
        """Draw all that was recorded of one layer over the training; as fastai's `ActivationStats` does, and more.

        Raises:
            KeyError: no layer of that name is recorded.
            IndexError: there are fewer layers.
        """
        name, frame = self.layer_names[self._history.place(layer)], self.to_frame()
        never_ran = self._records().assign(phase="train", layer=name).reindex(columns=frame.columns)
        return plot_layer(frame if (frame["layer"] == name).any() else never_ran, name, WORKS)

    def color_dim(
        self,
        layer: int | str | None = None,  # index in `layer_names`, or name; `None`: all layers, in one figure
        ax: Axes | None = None,  # draw one layer here
    ) -> Figure | Axes:  # the axes, if given
        """Draw the fast.ai course's "colourful dimension", histograms over the training; as `ActivationStats` does.

        Raises:
            ValueError: recorded without `with_hist`.
            KeyError: no layer of that name is recorded.
            IndexError: there are fewer layers.
        """
        if layer is None:
            return plot_hists({name: self.hist(name) for name in self.layer_names}, self._records(), HIST_RANGE)
        name = self.layer_names[self._history.place(layer)]
        return plot_hist(self.hist(layer), self._records(), name, HIST_RANGE, ax)

    # figures of all layers

    def plot_stats(
        self,
        *others: Reading,  # recorders of other runs of the network, to be drawn beside this one on the same scales
        names: Sequence[str] = (),  # of all runs; by default they are numbered
    ) -> Figure:  # of matplotlib
        """Draw the statistics of all layers over the training, with the band of updates that are known to work."""
        runs = (self, *others)
        activations = {name for run in runs for name, layer in run._history.layers.items() if not layer.has_parameters}
        if not others:
            return plot_stats(self.to_frame(), activations, WORKS)
        titles = names or [f"run {i + 1}" for i in range(len(runs))]
        return plot_runs({title: run.to_frame() for title, run in zip(titles, runs, strict=True)}, activations, WORKS)

    def dead_chart(self) -> Figure:  # of matplotlib
        """Draw how much of each layer is dead over the training, after the fast.ai course's chart."""
        return plot_dead(self.to_frame())

    def _values(self, column: str) -> Floats:
        self._flush()
        return self._history.values(column)

    def _series(self) -> tuple[Floats, ...]:
        return tuple(self._values(column) for column in ("mean", "std", "near_zero"))

    def _records(self) -> pd.DataFrame:
        """`fit, epoch, step` of the training records."""
        self._flush()
        return self._history.index("train")
