"""`ActivationStatsRecorder`: when activations are recorded in fastai, and how they are read."""

from __future__ import annotations

from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.distributed import rank_distrib
from fastai.learner import SkipToEpoch
from fastai.torch_core import get_model
from fastcore.foundation import L
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastai_lsuv.activation_curves import plot_layer, plot_stats
from fastai_lsuv.activation_maps import plot_dead, plot_hist, plot_hists
from fastai_lsuv.capture import Capture, columns
from fastai_lsuv.history import Floats, History, Record
from fastai_lsuv.hooks import NextCall
from fastai_lsuv.logs import CSVLog, logs_to_wandb, to_tensorboard, to_wandb
from fastai_lsuv.loop import came_through_fit, phase_of_batch
from fastai_lsuv.modules import Choice, chosen, layers_and_activations, without
from fastai_lsuv.stats import HIST_RANGE

_ON_DEVICE = 64  # records that wait on the device before they leave it together


class ActivationStatsRecorder(Callback):
    """Record statistics of the layers' outputs during training, of one history over several fits.

    Of each recorded batch and layer: mean and std of the output, and the share of it that is near zero. Nothing in
    training changes, to the bit. A hook copies a sample of the output (`fastai_lsuv.stats.SAMPLE` values, evenly
    spread: mean and std are within 2 % of the std; all values of smaller outputs) and waits for nothing; what the
    samples show leaves the device in bulk. A compiled model runs uncompiled in the batches that are recorded.

    Raises:
        ValueError: `every` or `max_records` below 1, `near_zero` below 0; when a fit starts, names that match nothing
            and an `fname` that has other columns.
        TypeError: an option of a wrong type.
    """

    # behind all of fastai's: what they make of a batch or raise in `before_batch` comes first, loggers have logged
    order = SkipToEpoch.order + 1

    def __init__(
        self,
        modules: Choice = None,  # any modules, as for `lsuv_`; `None`: leaves with parameters, and activations
        exclude: Choice = None,  # the same forms: these, and everything beneath them, are left out
        every: int = 1,  # each n-th training batch (and validation batch) is recorded
        with_hist: bool = False,  # histograms, too: `stats.HIST_BINS` bins over `stats.HIST_RANGE`
        with_grad: bool = False,  # mean and std of the gradient of each output, loss scaling taken out
        valid: bool = False,  # validation batches, too
        near_zero: float = 0.05,  # |x| up to this counts as near zero
        max_records: int = 2000,  # kept in memory; when full, every other old one is dropped
        fname: str | Path | None = None,  # CSV file in `learn.path`: written after every epoch, an old one continued
    ) -> None:
        _check(every=every, near_zero=near_zero, max_records=max_records)
        super().__init__()
        self.modules, self.exclude, self.every, self.with_hist = modules, exclude, every, with_hist
        self.with_grad, self.valid, self.near_zero, self.fname = with_grad, valid, near_zero, fname
        self.run_valid = valid
        self._history = History(max_records, columns(with_hist, with_grad))
        self._fit, self._step, self._first_step = -1, 0, 0
        self._csv: CSVLog | None = None
        self._stop()

    def _stop(self) -> None:
        """Let go of the model and of all tensors."""
        self.__dict__.update(
            _live=False, _layers=[], _places=[], _capture=None, _call=None, _loss=None, _scale=1.0, _table=None, _rows=[]
        )

    # when: real batches of real fits

    def before_fit(self) -> None:
        """Choose the layers, if this is a real fit (on the first rank)."""
        self._flush()  # what an interrupted fit has left
        self._stop()
        learn = self.learn
        if not came_through_fit(learn) or learn._grab_cbs(LRFinder) or rank_distrib():
            return
        model = get_model(getattr(learn.model, "_orig_mod", learn.model))
        model = getattr(model, "_orig_mod", model)
        picked = layers_and_activations(model) if self.modules is None else chosen(model, self.modules)
        names = {module: name for name, module in model.named_modules()}
        layers = sorted(without(model, picked, self.exclude), key=list(names).index)
        if self.fname is not None and self._csv is None:
            self._csv = CSVLog(Path(learn.path) / self.fname, self._history.frame([]).columns.tolist())
        self._places = self._history.add_layers([names[m] for m in layers], [type(m).__name__ for m in layers])
        self._layers, self._live, self._fit, self._first_step = layers, True, self._fit + 1, self._step

    def before_batch(self) -> None:
        """Watch the coming forward."""
        self._capture = self._call = None
        count = self._step if self.training else self.iter
        if self._live and count % self.every == 0 and phase_of_batch(self.learn) is not None:
            self._capture = Capture(self._layers, self.with_grad)
            self._call = NextCall(self.learn.model, self._capture.watching)

    def after_loss(self) -> None:
        """Note the loss before it is scaled for mixed precision."""
        if self._capture is not None and self.with_grad and self.training:
            self._loss = _plain(self.learn.loss_grad).clone()

    def after_backward(self) -> None:
        """Note by how much it was scaled."""
        if self._loss is not None:
            scale = _plain(self.learn.loss_grad) / self._loss
            self._scale, self._loss = torch.where(self._loss == 0, 1.0, scale), None

    def after_batch(self) -> None:
        """Compute what the samples show."""
        if self._call is not None:
            self._call.cancel()  # another callback may have cancelled the batch
        if self._capture is not None and self._capture.outputs:
            self._keep(self._capture)
        self._capture = self._call = self._loss = None
        self._scale = 1.0
        if self._live and self.training:
            self._step += 1

    def after_epoch(self) -> None:
        """Bring everything to where it is kept."""
        self._flush()

    def after_cancel_fit(self) -> None:
        """The same, before loggers close at the end of the fit."""
        self._flush()

    def after_fit(self) -> None:
        """The same, and let go of the model."""
        if self._live and came_through_fit(self.learn):
            self._flush()
            self._stop()

    def _keep(self, capture: Capture) -> None:
        values = capture.statistics(self.near_zero, self.with_hist, self._scale)
        if self._table is None or self._table.device != values.device:
            self._flush()
            self._table = values.new_empty(_ON_DEVICE, *values.shape)
        self._table[len(self._rows)] = values
        self._rows.append((self._fit, self.epoch, self._step, "train" if self.training else "valid"))
        if len(self._rows) == _ON_DEVICE or logs_to_wandb(self.learn):
            self._flush()

    def _flush(self) -> None:
        """Move the records that wait on the device to the history and the logs."""
        if not self._rows:
            return
        rows, self.__dict__["_rows"] = self._rows, []
        table = self._table[: len(rows)].cpu().numpy().copy()
        records = [Record(*row, self._history.placed(values, self._places)) for row, values in zip(rows, table, strict=True)]
        for record in records:
            self._history.add(record)
        frame = self._history.frame(records)
        if self._csv is not None:
            self._csv.write(frame)
        if self.learn is not None:
            to_tensorboard(self.learn, frame, self._first_step)
            to_wandb(self.learn, frame)

    # reading

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers in the model, in the order in which they are registered in it."""
        return list(self._history.names)

    def to_frame(self) -> pd.DataFrame:
        """All records held, a row a record and layer: `fit, epoch, step, phase, layer, mean, std, near_zero`, ….

        `fit` counts from 0; `step` counts the training batches of all fits; `phase` is `train` or `valid`; a layer that
        did not run in a batch has no row. With gradients also `grad_mean` and `grad_std`.
        """
        self._flush()
        return self._history.frame()

    def summary(self) -> pd.DataFrame:
        """A row for each layer that ran, with its `type`, `first_std`, `last_std`, `min_std`, `max_std`,
        `max_near_zero`, of all training records ever made, and a `verdict`: see `fastai_lsuv.history.verdict`.
        """
        self._flush()
        return self._history.summary()

    # reading, as fastai's `ActivationStats` does: of training records; a layer by its index or name

    @property
    def stats(self) -> L:
        """A record's layers' statistics, as `stats[record][layer]["std"]`: an `L` of `L`s of dictionaries."""
        mean, std, near_zero = self._series()
        hists = torch.from_numpy(self._values("hist")) if self.with_hist else None
        return L(
            L(
                {"mean": mean[i, j], "std": std[i, j], "near_zero": near_zero[i, j]}
                | ({} if hists is None else {"hist": hists[i, j]})
                for j in range(mean.shape[1])
            )
            for i in range(len(mean))
        )

    def layer_stats(
        self,
        layer: int | str,  # index in `layer_names`, or name
    ) -> L:  # of means, stds and near-zero shares, an `L` of each over the training records
        """Statistics of one layer over the training."""
        place = self._history.place(layer)
        return L(L(column[:, place].tolist()) for column in self._series())

    def hist(
        self,
        layer: int | str,  # index in `layer_names`, or name
    ) -> Tensor:  # (bins, training records)
        """Histograms of one layer over the training, as log(1 + count). Raises `ValueError` without `with_hist`."""
        if not self.with_hist:
            raise ValueError("no histograms were recorded: create ActivationStatsRecorder with with_hist=True")
        place = self._history.place(layer)
        return torch.from_numpy(self._values("hist")[:, place]).t().float().log1p()

    def plot_layer_stats(
        self,
        layer: int | str,  # index in `layer_names`, or name
    ) -> Figure:
        """Mean, std and near-zero share of one layer over the training."""
        return plot_layer(self.to_frame(), self.layer_names[self._history.place(layer)])

    def color_dim(
        self,
        layer: int | str | None = None,  # index in `layer_names`, or name; `None`: all layers, in one figure
        ax: Axes | None = None,  # draw one layer here
    ) -> Figure:
        """The course's "colourful dimension": histograms over the training. Raises `ValueError` without `with_hist`."""
        if layer is None:
            return plot_hists({name: self.hist(name) for name in self.layer_names}, self._records(), HIST_RANGE)
        return plot_hist(self.hist(layer), self._records(), self.layer_names[self._history.place(layer)], HIST_RANGE, ax)

    # figures of all layers

    def plot_stats(self) -> Figure:
        """Mean, std and near-zero share (and gradients) of all layers over the training."""
        return plot_stats(self.to_frame())

    def dead_chart(self) -> Figure:
        """The share of near-zero outputs of all layers over the training."""
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

    # what travels

    def __getstate__(self) -> dict[str, Any]:
        """With the history, without the model and what is on its device."""
        self._flush()
        stopped = ActivationStatsRecorder.__new__(ActivationStatsRecorder)
        stopped._stop()
        return super().__getstate__() | vars(stopped)


def _plain(loss: Tensor) -> Tensor:
    """Without its graph and without fastai's type."""
    return loss.detach().as_subclass(Tensor)


def _check(every: int, near_zero: float, max_records: int) -> None:
    for name, value in (("every", every), ("max_records", max_records)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected a whole number")
        if value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    if not isinstance(near_zero, Real) or isinstance(near_zero, bool):
        raise TypeError(f"near_zero={near_zero!r}: expected a number")
    if not near_zero >= 0:
        raise ValueError(f"near_zero={near_zero!r}: expected a number of at least 0")
