"""A pilot fit: fastai's own loop, run by copies of the Learner and its callbacks up to the first call of the model."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastcore.foundation import L
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader

from fastai_lsuv.core.copies import copied
from fastai_lsuv.core.errors import CannotRun
from fastai_lsuv.learner.loaders import Memo, loader_copy
from fastai_lsuv.learner.settings import autocasts, own_autocast, switches

if TYPE_CHECKING:
    from fastai.learner import Learner

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a forward
Setting = contextlib.AbstractContextManager[Any]

# Where callbacks are written that watch, schedule or distribute, and change nothing about the call.
_WATCHERS = ("fastai.callback.hook.", "fastai.callback.progress.", "fastai.callback.schedule.",
             "fastai.callback.wandb.", "fastai.distributed.", "fastai.learner.Recorder.", "fastai_lsuv.")  # fmt: skip
LOADERS = (DataLoader, DataLoaders, TorchDataLoader)


class UnknownInputs(CannotRun):
    """It is unknown how training calls the model, and it can't be called with what the DataLoader gives."""


class Fed(NamedTuple):
    """How training calls the model."""

    call: Call
    settings: list[Setting]  # in force then
    doubt: str | None = None  # what is wrong if it can't be called so


def first_call(
    learn: Learner,
    batch: Any,  # as the DataLoaders give it
    begun: float = -math.inf,  # callbacks of a smaller order have had their `before_fit`
) -> Fed:
    """Return how training calls the model with its first batch.

    A callback that fails on trial is left out, with a warning. Where the Learner itself fails, or doesn't call its
    model, the model is taken to be called with the inputs in the batch.
    """
    callbacks, doubt = [cb for cb in learn.cbs if _takes_part(cb, begun)], None
    while True:
        trial = _Trial(learn, callbacks, begun)
        if (fed := trial.run(batch)) is not None:
            return fed._replace(doubt=doubt)
        culprit = trial.culprit
        inputs = "as the DataLoader gives them" if culprit is None else f"as they are without {type(culprit).__name__}"
        warnings.warn(f"LSUV: measuring with the inputs {inputs}, because {trial.problem}", stacklevel=2)
        doubt = f"{trial.problem}, and the model can't be called with the inputs {inputs}"
        if culprit is None:
            return Fed(_raw_call(learn, batch, doubt), list(autocasts(learn)), doubt)
        callbacks.remove(culprit)


def _takes_part(cb: Callback, begun: float) -> bool:
    """Whether a callback acts, and doesn't only watch, between the model's being set to training and its call."""
    if isinstance(cb, NonNativeMixedPrecision) and begun == -math.inf:
        return False  # outside a fit the model isn't in the half precision yet for which this one casts the inputs
    events = ("before_train", "before_batch")
    written = [next((base for base in type(cb).__mro__ if event in vars(base)), None) for event in events]
    acts = any(base and not f"{base.__module__}.{base.__name__}.".startswith(_WATCHERS) for base in written)
    return acts or not vars(cb).keys().isdisjoint(events)


def _raw_call(learn: Learner, batch: Any, doubt: str) -> Call:
    if not isinstance(batch, (tuple, list)):
        raise UnknownInputs(doubt)
    n_inp = getattr(learn.dls, "n_inp", max(len(batch) - 1, 1))
    return tuple(copied(learn._set_device(batch))[:n_inp]), {}


class _Ended(BaseException):
    """Ends a pilot fit at the call of the model, or with the batch; no `except Exception` on the way holds it up."""


class _Trial:
    """One pilot fit."""

    def __init__(self, learn: Learner, callbacks: Iterable[Callback], begun: float) -> None:
        self.learn, self.callbacks, self.begun = learn, callbacks, begun
        self.memo: Memo = {}  # the copies
        self.original_of: dict[int, Callback] = {}
        self.events = 0  # at work
        self.culprit: Callback | None = None  # whose failure is the problem
        self.problem = f"{type(learn).__name__} doesn't call its model"
        self.fed: Fed | None = None

    def run(self, batch: Any) -> Fed | None:
        """Return how the model is called; None if it isn't, and there is a problem."""
        pilot: Any = object.__new__(type(type(self.learn).__name__, (_Pilot, type(self.learn)), {}))
        handles = []
        try:
            with _no_trace():
                self._prepare(pilot, batch)
                handles += [pilot.model.register_forward_pre_hook(self._stop, prepend=True, with_kwargs=True)]
                pilot._with_events(pilot._do_fit, "fit", CancelFitException)
        except _Ended:
            pass
        except Exception as error:
            if self.culprit is None:
                self.problem = f"{type(self.learn).__name__} failed in the trial run: {_in_short(error)}"
        finally:
            for handle in handles:
                handle.remove()
            vars(pilot).clear()  # copies refer to it: that of the model would stay until the next garbage collection
            self.memo.clear()
        return self.fed

    def _prepare(self, pilot: Any, batch: Any) -> None:
        """Give the pilot one batch, and copies of the callbacks; of all else it makes copies when asked."""
        learn, loaders = self.learn, Memo()
        self.memo[id(learn)] = pilot
        dls = loader_copy(DataLoaders([], []) if learn.dls is None else learn.dls, loaders)
        given = [[copied(batch)], *([] for _ in dls.loaders[1:])]
        dls.loaders = [_Giving(dl, batches) for dl, batches in zip(dls.loaders, given, strict=True)]
        if learn.dls is not None:
            self.memo[id(learn.dls)] = dls
            self.memo |= {id(dl): new for dl, new in zip(learn.dls.loaders, dls.loaders, strict=True)}
        vars(pilot).update(_trial=self, dls=dls, cbs=L())
        for cb in self.callbacks:
            self.memo |= {id(v): loader_copy(v, loaders) for v in vars(cb).values() if isinstance(v, LOADERS)}
            with self.responsible(cb, "__deepcopy__"):
                pilot.cbs.append(new := self.copy(cb))
                self.original_of[id(new)] = cb
        for name in vars(learn).keys() & set(dir(type(learn))):  # methods that have been given to this Learner
            vars(pilot)[name] = self.copy(vars(learn)[name])

    def copy(self, original: Any) -> Any:
        """Return a copy to be used in the original's stead.

        Raises:
            TypeError: there is something in it that can't be copied and that would miss what is taken from it.
        """
        known = set(self.memo)
        new = copied(original, self.memo)
        shared = [o for key, o in self.memo.items() if key not in known and id(o) == key]
        taken = [o for o in shared if isinstance(o, Iterator) and not isinstance(o, io.IOBase)]
        if isinstance(original, Callback) and new is original:
            taken = [original]
        if taken and not isinstance(original, nn.Module):
            raise TypeError(f"can't copy {taken[0]!r}")
        return new

    @contextlib.contextmanager
    def responsible(self, cb: Callback | None, event: str) -> Iterator[None]:
        """What fails in the block is the problem of this callback, and no call of the model is the loop's."""
        self.events += 1
        try:
            yield
        except BaseException as error:
            self.culprit, self.problem = cb, f"{type(cb).__name__}.{event} failed in the trial run: {_in_short(error)}"
            raise
        finally:
            self.events -= 1

    def _stop(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model: end the fit, unless it is a callback that asks the model something."""
        if self.events == 0:
            self.fed = Fed((args, kwargs), [switches(self.learn.model, self.memo), *autocasts(self.learn)])
            raise _Ended


def _in_short(error: BaseException) -> str:
    """Return an error in one line, without what fastai puts in front of a callback's."""
    message = str(error).rpartition("`:" + chr(10) + chr(9))[2].partition(chr(10))[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextlib.contextmanager
def _no_trace() -> Iterator[None]:
    """What is printed and warned of will be heard when training says it; what is set for all is set back."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), own_autocast():
        warnings.simplefilter("ignore")
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield


class _Pilot:
    """What a pilot has of its own; all else is that of the Learner's class, and copies of what the Learner has."""

    def __getattr__(self, name: str) -> Any:
        trial = vars(self).get("_trial")  # gone when the fit is over
        if trial is None or name not in vars(trial.learn):
            return super().__getattr__(name)  # type: ignore[misc]
        value = self.__dict__[name] = trial.copy(vars(trial.learn)[name])
        if name == "opt" and value is None:  # as at the beginning of each fit
            self.create_opt()
        return vars(self)[name]

    def _call_one(self, event_name: str) -> None:
        trial = vars(self)["_trial"]
        for cb in self.cbs.sorted("order"):
            if event_name != "before_fit" or cb.order >= trial.begun:
                with trial.responsible(trial.original_of.get(id(cb)), event_name):
                    cb(event_name)


class _Giving:
    """Looks like a DataLoader, and gives these batches; a pilot fit ends with them."""

    def __init__(self, dl: Any, batches: list[Any]) -> None:
        self.dl, self.batches = dl, batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        if self.batches:
            raise _Ended

    def __len__(self) -> int:
        return len(self.dl)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dl, name)
