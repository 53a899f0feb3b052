"""`ActivationStatsRecorder`: when activations are recorded in fastai."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal
from weakref import ref

import pandas as pd
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import LRFinder
from fastai.torch_core import rank_distrib
from torch import nn

from fastai_lsuv.core.modules import has_parameters, plain
from fastai_lsuv.core.options import with_options
from fastai_lsuv.core.selection import Choice
from fastai_lsuv.learner.loop import at_end_of_next_stage, came_through_fit, phase_of_batch
from fastai_lsuv.recording.arguments import check
from fastai_lsuv.recording.budget import Budget, Clock, DeviceClock
from fastai_lsuv.recording.capture import Capture, columns
from fastai_lsuv.recording.history import History, Layer, Record
from fastai_lsuv.recording.layers import has_matrix, is_known, recorded_layers
from fastai_lsuv.recording.live import LiveChart
from fastai_lsuv.recording.logs import CSVLog, logs_to_wandb, to_tensorboard, to_wandb
from fastai_lsuv.recording.reading import Reading
from fastai_lsuv.recording.session import Session, Where
from fastai_lsuv.recording.verdicts import diagnosis


class ActivationStatsRecorder(Reading, Callback):
    """Record statistics of the layers' outputs during training: a fastai `Callback`, in place of its `ActivationStats`.

    One history over several fits. Of each recorded batch and layer: mean and std of the output, and the share of it
    that is near zero. Nothing in training changes, to the bit. A hook copies a sample of the output (about
    `fastai_lsuv.recording.sampling.SAMPLE` values, evenly spread: mean and std are within 2% of the std; all values of
    smaller outputs) and waits for nothing. Of it, shares and histograms count about 4,096 values. What the samples
    show is computed for all layers together, and leaves the device in bulk.

    What runs between `before_batch` and the next event is seen, whoever calls it; hooks are on the model for that time
    only. A compiled model runs uncompiled in the batches that are recorded.

    Raises:
        ValueError: `every` or `max_records` below 1, `near_zero` below 0; when a fit starts, names that match nothing
            and an `fname` that has other columns.
        TypeError: an option of a wrong type.

    Example:
        >>> from fastai.basics import Learner
        >>> from fastai_lsuv import ActivationStatsRecorder
        >>> from fastai_lsuv.demo import digits_dls, plain_cnn
        >>> recorder = ActivationStatsRecorder(with_hist=True, verbose=False)
        >>> learn = Learner(digits_dls(), plain_cnn(), cbs=recorder)
        >>> with learn.no_bar(), learn.no_logging():
        ...     learn.fit(1)
        >>> recorder.summary()["verdict"]["head"]  # default weights: all images look the same
        'vanishing'
        >>> recorder.layer_names[:3]
        ['conv1', 'act1', 'conv2']
        >>> recorder.to_frame().columns.tolist()[4:]
        ['layer', 'mean', 'std', 'near_zero', 'sparsity', 'at_limit', 'signal', 'update', 'dead_units']
        >>> means, stds, near_zero = recorder.layer_stats("conv1")
        >>> stds[-1] == recorder.stats[-1][0]["std"]
        True
        >>> recorder.hist("conv1").shape  # bins, batches
        torch.Size([40, 22])
        >>> figures = recorder.plot_stats(), recorder.dead_chart(), recorder.color_dim(), recorder.plot_layer_stats(0)
    """

    # Behind all others, fastai's last (`SkipToEpoch`) and users': what they make of a batch or raise in `before_batch`
    # comes first, and loggers have logged. But while the model is watched ahead of all others: whatever event comes,
    # nothing that they do is seen, and they find no hook on the model.
    order = math.inf

    @with_options
    def __init__(  # noqa: PLR0913
        self,
        modules: Choice = None,  # any modules, as for `lsuv_`; `None`: every leaf but PyTorch's for pooling, …
        exclude: Choice = None,  # the same forms: these, and everything beneath them, are left out
        *,
        every: int | Literal["auto"] = 1,  # each n-th batch of training (and validation); "auto": at 2% of the time
        with_hist: bool = False,  # histograms, too: `sampling.HIST_BINS` bins over `HIST_RANGE`
        with_grad: bool = False,  # mean and std of the gradient of each output, loss scaling taken out
        valid: bool = False,  # validation batches, too
        near_zero: float = 0.05,  # |x| up to this counts as near zero
        max_records: int = 2000,  # kept in memory; when full, every other old one is dropped
        fname: str | Path | None = None,  # CSV file in `learn.path`: written after every epoch, an old one continued
        stop_on: str | Collection[str] | Callable[[pd.DataFrame], Any] = (),  # verdicts that end the fit, or a function
        live: bool = False,  # in a notebook, draw `plot_stats()` anew while it trains, at 1% of the time
        verbose: bool = True,  # say at the end of a fit what is wrong, and what could not be recorded
    ) -> None:
        check(modules, every, near_zero, max_records, stop_on)
        super().__init__()
        self.modules, self.exclude, self.every, self.with_hist = modules, exclude, every, with_hist
        self.with_grad, self.valid, self.near_zero = with_grad, valid, near_zero
        self.fname, self.live, self.verbose = fname, live, verbose
        self.stop_on = (stop_on,) if isinstance(stop_on, str) else stop_on
        self.run_valid = valid
        self._history = History(max_records, columns(with_hist, with_grad))
        self._csv: CSVLog | None = None
        self._fits = self._steps = 0  # so far
        self._model: ref[nn.Module] | None = None  # of the last fit that was recorded
        self._session: Session | None = None  # none: this fit is not recorded
        self._chart: LiveChart | None = None

    # when: real batches of real fits

    def before_fit(self) -> None:
        """Choose the layers, if this is a real fit (on the first rank)."""
        learn = self.learn
        if not came_through_fit(learn):  # a validation, perhaps in the middle of a fit
            return
        self._let_go()  # of what an interrupted fit has left
        if learn._grab_cbs(LRFinder) or rank_distrib():
            return
        layers = recorded_layers(learn.model, self.modules, self.exclude)
        if self.fname is not None and self._csv is None:
            self._csv = CSVLog(Path(learn.path) / self.fname, self._history.frame([]).columns.tolist())
        model = plain(learn.model)
        if self._model is not None and self._model() is not model:
            self._history.start_over()
        places = self._history.add_layers({name: _described(module) for name, module in layers.items()})
        capture, budget = Capture(model, [*layers.values()], self.with_grad), Budget(_clock_of(model))
        self._model, self._session = ref(model), Session(self._fits, self._steps, [*layers], places, capture, budget)
        self._fits += 1
        self._chart = LiveChart(self.plot_stats) if self.live else None
        at_end_of_next_stage(learn, self._look_away)

    def before_batch(self) -> None:
        """Watch what the model does from now to the next event."""
        if self._session is None:
            return
        self._look_away()  # the Learner may fetch predictions in between
        if (phase := phase_of_batch(self.learn)) is None:
            return
        self._end_batch()  # another callback may have cut the last one short, or the epoch with it
        is_due = self._is_due(self._session.budget)
        self._session.begin(Where(self._session.fit, self.epoch, self._steps, phase), is_due)
        self.order = -math.inf

    def _is_due(self, budget: Budget) -> bool:
        """Whether the batch is one of those to be recorded."""
        if self.every == "auto":
            return budget.begin_step(self.iter == 0) if self.training else self.iter % budget.every == 0
        return bool((self._steps if self.training else self.iter) % self.every == 0)

    def _look_away(self) -> None:
        """What runs from here on may be other callbacks' doing, or a forward pass that is made again."""
        self.order = math.inf
        if self._session is not None:
            self._session.capture.stop()

    def after_pred(self) -> None:
        """The forward pass is over."""
        self._look_away()

    def after_loss(self) -> None:
        """Note the loss before it is scaled for mixed precision."""
        self._look_away()
        if self._session is not None and self.training:
            self._session.note_loss(vars(self.learn).get("loss_grad"))

    def after_backward(self) -> None:
        """Note by how much it was scaled."""
        if self._session is not None:
            self._session.note_scaled(vars(self.learn).get("loss_grad"))

    def after_batch(self) -> None:
        """Compute what the samples show."""
        if self._session is not None and phase_of_batch(self.learn) is not None:
            self._session.n_batches += 1
            was_recorded = self._session.is_watched
            self._end_batch()
            if self._chart is not None:
                self._chart.refresh()
            if was_recorded and self.stop_on:
                self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """End the fit if what has been recorded so far is reason enough; this waits for the device."""
        assert self._session is not None
        self._flush()
        if callable(self.stop_on):
            reason = self.stop_on(self.summary())
        else:
            reason = diagnosis(self._history.facts(), self.stop_on)
        if reason:
            self._session.is_stopped = True
            if self.verbose:
                print(f"ActivationStatsRecorder: stopped after step {self._steps - 1}, as asked for" + f": {reason}")
            raise CancelFitException

    def after_cancel_train(self) -> None:
        """Keep the batch in which it was cancelled, before anything else is done to the weights."""
        self._end_batch()

    after_cancel_epoch = after_cancel_train

    def after_epoch(self) -> None:
        """Bring everything to where it is kept."""
        self._end_batch()
        self._flush()
        if self._session is not None and self.epoch + 1 < self.n_epoch and came_through_fit(self.learn):
            at_end_of_next_stage(self.learn, self._look_away)

    def after_cancel_fit(self) -> None:
        """The same, before loggers close at the end of the fit."""
        self._end_batch()
        self._flush()

    def after_fit(self) -> None:
        """The same, say what could not be recorded, and let go of the model."""
        if self._session is not None and came_through_fit(self.learn):
            self._end_batch()
            session = self._session
            self._let_go()
            lines = [session.complaint()]
            if session.n_recorded and not session.is_stopped:
                lines.append(diagnosis(self._history.facts()))
            if self._chart is not None:
                self._chart.refresh(at_end=True)
            for line in filter(None, lines if self.verbose else []):
                print(f"ActivationStatsRecorder: {line}")

    def _end_batch(self) -> None:
        """Keep the batch at hand, if there is one, and count it."""
        session = self._session
        if session is None or session.at is None:
            return
        self._look_away()
        self._steps += session.at.phase == "train"
        session.end(self.near_zero, self.with_hist)
        if session.device_buffer.full or logs_to_wandb(self.learn):
            self._flush()

    def _let_go(self) -> None:
        """Of the model and of all tensors."""
        self._look_away()
        self._flush()
        self._session = None

    def _flush(self) -> None:
        """Move the records that wait on the device to the history and the logs."""
        session = self._session
        sent = session.device_buffer.empty() if session is not None else []
        if session is None or not sent:
            return
        records = [Record(*at, values=self._history.placed(values, session.places)) for at, values in sent]
        for record in records:
            self._history.add(record)
        frame = self._history.frame(records)
        if self._csv is not None:
            self._csv.write(frame)
        if self.learn is not None:
            to_tensorboard(self.learn, frame, session.first_step)
            to_wandb(self.learn, frame)

    # what travels

    def __getstate__(self) -> dict[str, Any]:
        """With the history, without the model and what is on its device."""
        self._flush()
        return super().__getstate__() | {"_session": None, "_model": None, "_chart": None}


def _described(module: nn.Module) -> Layer:
    return Layer(type(module).__name__, is_known(module), has_parameters(module), has_matrix(module))


def _clock_of(model: nn.Module) -> Clock:
    """What tells how long its steps take."""
    on_cuda = any(p.is_cuda for p in model.parameters())
    return DeviceClock() if on_cuda else Clock()
