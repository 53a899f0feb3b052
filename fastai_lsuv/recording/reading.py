"""How recorded statistics are read: as frames, by fastai's `ActivationStats` interface, as figures."""

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
    """The reading half of `ActivationStatsRecorder`. Layers are given by name, or by index in `layer_names`."""

    _history: History
    with_hist: bool

    def _flush(self) -> None:
        """Bring the history up to date."""

    @property
    def layer_names(self) -> list[str]:  # as in `named_modules()`; empty before the first fit
        """The names of the recorded layers, in the order in which the model registers them."""
        return list(self._history.names)

    def to_frame(self) -> pd.DataFrame:  # tidy: one row per record and layer
        """Return all records held, one row per record and layer.

        `fit` and `epoch` count from 0. `step` counts training batches over all fits. `phase` is `train` or `valid`. A
        layer that did not run in a batch has no row for it. The other columns are

        * `mean`, `std`: of the layer's output
        * `near_zero`: the share of values near zero, as the option `near_zero` defines it
        * `sparsity`: the share of values within 5% of the layer's std around zero
        * `at_limit`: the share of values whose size is close to the largest
        * `signal`: the share of the std that is due to the input: the std over the batch at the same place, divided by
          the whole std
        * `update`: the size of the step's weight update relative to the size of the weights, ‖Δw‖/‖w‖; NaN for layers
          with nothing to train
        * `dead_units`: the share of an activation's channels that have not fired yet in the epoch's recorded batches
          (with `every=1`, in any batch); NaN for other layers. Of functional activations only ReLU is recognised; its
          share is in the row of the layer before it, from the second record of a fit on
        * `grad_mean`, `grad_std`: of the gradient of the output, if recorded `with_grad`
        """
        self._flush()
        return self._history.frame()

    def summary(self) -> pd.DataFrame:  # indexed by layer name
        """Return one row per layer that ran, with a `verdict` on it and the number behind it, `because`.

        The rules are in `fastai_lsuv.recording.verdicts.verdicts`. `first_std`, `last_std`, `min_std`, `max_std` and
        `max_near_zero` cover all training records ever made. `last_mean`, `signal`, `dead_units` (over the last epoch)
        and `last_update` are from the latest record; verdicts on updates go by their mean over the last fit instead.

        A terminal shows the verdict first and the reason last, and leaves out columns in between that don't fit;
        `print(recorder.summary().to_string())` shows them all.
        """
        self._flush()
        return self._history.summary()

    # The interface of fastai's `ActivationStats`, for training records.

    @property
    def stats(self) -> L:  # for each training record, an `L` with a dictionary for each layer
        """All statistics as `stats[record][layer]["std"]`, like those of fastai's `ActivationStats`."""
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
    ) -> L:  # means, stds and near-zero shares: an `L` of each, over the training records
        """Return the statistics of one layer over training, like fastai's `ActivationStats`.

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
        """Return the histograms of one layer over training, as log(1 + count), like fastai's `ActivationStats`.

        Raises:
            ValueError: no histograms were recorded (`with_hist`).
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
    ) -> Figure:  # a matplotlib figure
        """Plot everything recorded of one layer over training: what fastai's `ActivationStats` plots, and more.

        Raises:
            KeyError: no layer of that name is recorded.
            IndexError: there are fewer layers.
        """
        name, frame = self.layer_names[self._history.place(layer)], self.to_frame()
        never_ran = self._records().assign(phase="train", layer=name).reindex(columns=frame.columns)
        return plot_layer(frame if (frame["layer"] == name).any() else never_ran, name, WORKS)

    def color_dim(
        self,
        layer: int | str | None = None,  # index in `layer_names`, or name; `None`: all layers in one figure
        ax: Axes | None = None,  # draw one layer on these axes
    ) -> Figure | Axes:  # the axes, if given
        """Plot histograms over training, the fast.ai course's "colourful dimension", as `ActivationStats` does.

        Raises:
            ValueError: no histograms were recorded (`with_hist`).
            KeyError: no layer of that name is recorded.
            IndexError: there are fewer layers.
        """
        if layer is None:
            return plot_hists({name: self.hist(name) for name in self.layer_names}, self._records(), HIST_RANGE)
        name = self.layer_names[self._history.place(layer)]
        return plot_hist(self.hist(layer), self._records(), name, HIST_RANGE, ax)

    # Figures of all layers.

    def plot_stats(
        self,
        *others: Reading,  # recorders of other runs of the same network, drawn beside this one on the same scales
        names: Sequence[str] = (),  # of all runs; numbered by default
    ) -> Figure:  # a matplotlib figure
        """Plot the statistics of all layers over training, with a band where good learning rates put the updates."""
        runs = (self, *others)
        activations = {name for run in runs for name, layer in run._history.layers.items() if not layer.has_parameters}
        if not others:
            return plot_stats(self.to_frame(), activations, WORKS)
        titles = names or [f"run {i + 1}" for i in range(len(runs))]
        return plot_runs({title: run.to_frame() for title, run in zip(titles, runs, strict=True)}, activations, WORKS)

    def dead_chart(self) -> Figure:  # a matplotlib figure
        """Plot the near-zero share of every layer over training, after the fast.ai course's chart."""
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
