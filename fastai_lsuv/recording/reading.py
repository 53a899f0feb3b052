"""How a recorded history is read: frames, fastai's `ActivationStats` interface, figures."""

from __future__ import annotations

import pandas as pd
import torch
from fastcore.foundation import L
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastai_lsuv.plots.curves import plot_layer, plot_stats
from fastai_lsuv.plots.maps import plot_dead, plot_hist, plot_hists
from fastai_lsuv.recording.description import HIST_RANGE
from fastai_lsuv.recording.history import Floats, History


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
        """All records held, a row a record and layer: `fit, epoch, step, phase, layer, mean, std, near_zero`, ….

        `fit` counts from 0; `step` counts the training batches of all fits; `phase` is `train` or `valid`; a layer that
        did not run in a batch has no row. With gradients also `grad_mean` and `grad_std`.
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
        """Draw mean, std and near-zero share of one layer over the training; as fastai's `ActivationStats` does.

        Raises:
            KeyError: no layer of that name is recorded.
            IndexError: there are fewer layers.
        """
        name, frame = self.layer_names[self._history.place(layer)], self.to_frame()
        never_ran = self._records().assign(phase="train", layer=name).reindex(columns=frame.columns)
        return plot_layer(frame if (frame["layer"] == name).any() else never_ran, name)

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

    def plot_stats(self) -> Figure:  # of matplotlib
        """Draw mean, std and near-zero share (and gradients) of all layers over the training."""
        return plot_stats(self.to_frame())

    def dead_chart(self) -> Figure:  # of matplotlib
        """Draw the share of near-zero outputs of all layers over the training, after the fast.ai course's chart."""
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
