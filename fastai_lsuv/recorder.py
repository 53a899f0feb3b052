"""`ActivationStatsRecorder`: when activations are recorded in fastai."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.torch_core import get_model, rank_distrib
from torch import Tensor, nn

from fastai_lsuv.core.hooks import NextCall
from fastai_lsuv.core.random_state import RandomState
from fastai_lsuv.core.selection import Choice, chosen, excluded, layers_and_activations
from fastai_lsuv.learner.loop import came_through_fit, phase_of_batch
from fastai_lsuv.recording.capture import Capture, Outbox, columns
from fastai_lsuv.recording.history import History, Record
from fastai_lsuv.recording.logs import CSVLog, logs_to_wandb, to_tensorboard, to_wandb
from fastai_lsuv.recording.reading import Reading


class ActivationStatsRecorder(Reading, Callback):
    """Record statistics of the layers' outputs during training: a fastai `Callback`, in place of its `ActivationStats`.

    One history over several fits. Of each recorded batch and layer: mean and std of the output, and the share of it
    that is near zero. Nothing in training changes, to the bit. A hook copies a sample of the output (about
    `fastai_lsuv.recording.sampling.SAMPLE` values, evenly spread: mean and std are within 2 % of the std; all values of
    smaller outputs) and waits for nothing. Of it, shares and histograms count about 4,096 values. What the samples
    show leaves the device in bulk. A compiled model runs uncompiled in the batches that are recorded.

    Raises:
        ValueError: `every` or `max_records` below 1, `near_zero` below 0; when a fit starts, names that match nothing
            and an `fname` that has other columns.
        TypeError: an option of a wrong type.

    Example:
        >>> from fastai.basics import Learner
        >>> from fastai_lsuv import ActivationStatsRecorder
        >>> from fastai_lsuv.demo import digits_dls, plain_cnn
        >>> recorder = ActivationStatsRecorder(with_hist=True)
        >>> learn = Learner(digits_dls(), plain_cnn(), cbs=recorder)
        >>> with learn.no_bar(), learn.no_logging():
        ...     learn.fit(1)
        >>> recorder.summary()["verdict"]["head"]  # default weights: all images look the same
        'vanishing'
        >>> recorder.layer_names[:3]
        ['conv1', 'act1', 'conv2']
        >>> recorder.to_frame().columns.tolist()
        ['fit', 'epoch', 'step', 'phase', 'layer', 'mean', 'std', 'near_zero']
        >>> means, stds, near_zero = recorder.layer_stats("conv1")
        >>> stds[-1] == recorder.stats[-1][0]["std"]
        True
        >>> recorder.hist("conv1").shape  # bins, batches
        torch.Size([40, 22])
        >>> figures = recorder.plot_stats(), recorder.dead_chart(), recorder.color_dim(), recorder.plot_layer_stats(0)
    """

    # behind all others, fastai's last (`SkipToEpoch`) and users': what they make of a batch or raise in `before_batch`
    # comes first, and loggers have logged
    order = math.inf

    def __init__(
        self,
        modules: Choice = None,  # any modules, as for `lsuv_`; `None`: leaves with parameters, and activations
        exclude: Choice = None,  # the same forms: these, and everything beneath them, are left out
        every: int = 1,  # each n-th training batch (and validation batch) is recorded
        with_hist: bool = False,  # histograms, too: `sampling.HIST_BINS` bins over `HIST_RANGE`
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
        self._fit, self._steps, self._first_step = -1, 0, 0
        self._csv: CSVLog | None = None
        self._forget()

    def _forget(self) -> None:
        """Let go of the model and of all tensors."""
        self._layers: list[ref[nn.Module]] = []  # none: this fit is not recorded
        self._places: list[int] = []  # of the layers in the history
        self._outbox: Outbox[tuple[int, int, int, str]] = Outbox()
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._where: tuple[int, int, int, str] | None = None  # the batch at hand, if it is one of a fit's own
        self._capture: Capture | None = None
        self._call: NextCall | None = None
        self._loss: Tensor | None = None  # as it was before it was scaled for mixed precision
        self._scale: Tensor | float = 1.0  # by how much it was

    # when: real batches of real fits

    def before_fit(self) -> None:
        """Choose the layers, if this is a real fit (on the first rank)."""
        learn = self.learn
        if not came_through_fit(learn):  # a validation, perhaps in the middle of a fit
            return
        self._end_batch()  # what an interrupted fit has left
        self._flush()
        self._forget()
        if learn._grab_cbs(LRFinder) or rank_distrib():
            return
        model = _unwrapped(learn.model)
        random_state = RandomState()  # a module that draws numbers may be tried: is it an activation?
        picked = layers_and_activations(model) if self.modules is None else chosen(model, self.modules)
        random_state.restore()
        names = {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}  # compiled parts
        layers = sorted(set(picked) - excluded(model, self.exclude), key=list(names).index)
        if self.fname is not None and self._csv is None:
            self._csv = CSVLog(Path(learn.path) / self.fname, self._history.frame([]).columns.tolist())
        self._places = self._history.add_layers([names[m] for m in layers], [type(m).__name__ for m in layers])
        self._layers, self._fit, self._first_step = [ref(m) for m in layers], self._fit + 1, self._steps

    def before_batch(self) -> None:
        """Watch the coming forward."""
        phase = phase_of_batch(self.learn) if self._layers else None
        if phase is None:
            return
        self._end_batch()  # another callback may have cut the last one short, or the epoch with it
        self._where = self._fit, self.epoch, self._steps, phase
        if (self._steps if self.training else self.iter) % self.every == 0:
            layers = [module for layer in self._layers if (module := layer()) is not None]  # all: they are the model's
            self._capture = Capture(len(layers), self.with_grad)
            self._call = NextCall(self.learn.model, partial(self._capture.watch, self.learn.model, layers))

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
        if self._where is not None and phase_of_batch(self.learn) is not None:
            self._end_batch()

    def after_epoch(self) -> None:
        """Bring everything to where it is kept."""
        self._end_batch()
        self._flush()

    def after_cancel_fit(self) -> None:
        """The same, before loggers close at the end of the fit."""
        self._end_batch()
        self._flush()

    def after_fit(self) -> None:
        """The same, and let go of the model."""
        if self._layers and came_through_fit(self.learn):
            self._end_batch()
            self._flush()
            self._forget()

    def _end_batch(self) -> None:
        """Keep the batch at hand, if there is one and the model got through it, and count it."""
        if self._where is None:
            return
        if self._call is not None:
            self._call.cancel()  # another callback may have cancelled the batch before its forward
        if self._capture is not None and self._capture.complete:
            self._outbox.add(self._where, self._capture.statistics(self.near_zero, self.with_hist, self._scale))
        self._steps += self._where[-1] == "train"
        self._forget_batch()
        if self._outbox.full or logs_to_wandb(self.learn):
            self._flush()

    def _flush(self) -> None:
        """Move the records that wait on the device to the history and the logs."""
        sent = self._outbox.empty()
        if not sent:
            return
        records = [Record(*where, values=self._history.placed(values, self._places)) for where, values in sent]
        for record in records:
            self._history.add(record)
        frame = self._history.frame(records)
        if self._csv is not None:
            self._csv.write(frame)
        if self.learn is not None:
            to_tensorboard(self.learn, frame, self._first_step)
            to_wandb(self.learn, frame)

    # what travels

    def __getstate__(self) -> dict[str, Any]:
        """With the history, without the model and what is on its device."""
        self._flush()
        forgotten = {"_layers": [], "_places": [], "_outbox": Outbox(), "_capture": None, "_call": None, "_loss": None}
        forgotten["_where"] = None
        return super().__getstate__() | forgotten | {"_scale": 1.0}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what compiles it or spreads it over devices, in whatever order."""
    inner = get_model(getattr(model, "_orig_mod", model))
    return model if inner is model else _unwrapped(inner)


def _plain(loss: Tensor) -> Tensor:
    """Without its graph and without fastai's type."""
    return loss.detach().as_subclass(Tensor)


def _check(every: Any, near_zero: Any, max_records: Any) -> None:
    for name, value in (("every", every), ("max_records", max_records)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected a whole number")
        if value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    if not isinstance(near_zero, (int, float)) or isinstance(near_zero, bool):
        raise TypeError(f"near_zero={near_zero!r}: expected a number")
    if not near_zero >= 0:
        raise ValueError(f"near_zero={near_zero!r}: expected a number of at least 0")
