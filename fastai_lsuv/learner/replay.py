"""What other callbacks make of a batch before the model gets it, found out on copies."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.torch_core import apply
from fastcore.foundation import L
from torch import Tensor

from fastai_lsuv.learner.effects import EVENTS, names_in, rewrites_inputs, switches_autocast

if TYPE_CHECKING:
    from fastai.learner import Learner

T = TypeVar("T")

_DEVICES = ("cpu", "cuda", "mps", "xpu")  # with an autocast of their own


class Replay:
    """The first training batch of a Learner as far as the model: split, rewritten by callbacks, under their autocast.

    Works on a stand-in for the Learner and on copies of those callbacks that rewrite inputs or switch autocast on, so
    that theirs and the Learner's state is as if nothing had happened. All other callbacks (schedulers, loggers,
    progress bars) stay out of it. What fails on trial is left out, with a warning.
    """

    def __init__(
        self,
        learn: Learner,
        batch: Any,  # as the DataLoader gives it, on the model's device
        begun: float,  # callbacks of a smaller order have had their `before_fit`
    ) -> None:
        self.learn, self.batch, self.begun = learn, batch, begun
        self.cbs = learn.cbs.sorted("order")
        self.failing = ""  # who is at work

    def inputs(self) -> tuple[Any, ...]:
        """What the model will be called with."""
        callbacks = [cb for cb in self.cbs if rewrites_inputs(cb) and not self._is_early(cb)]
        with _own_autocast():
            inputs = self._tried(callbacks, "the inputs are taken as the DataLoader gives them") if callbacks else None
        return self._inputs_after([]) if inputs is None else inputs

    def autocasts(self) -> list[torch.autocast]:
        """The autocast contexts in which the model will be called, one a device type at most."""
        with _own_autocast(), contextlib.ExitStack() as stack:
            for cb in self.cbs:
                if switches_autocast(cb):
                    self._tried([cb], "its autocast is left out")
                if (accelerator := vars(cb).get("accelerator")) is not None:  # it will wrap the model's forward
                    stack.enter_context(accelerator.autocast())
            return [torch.autocast(t, torch.get_autocast_dtype(t)) for t in _DEVICES if torch.is_autocast_enabled(t)]

    def _tried(self, callbacks: list[Callback], consequence: str) -> tuple[Any, ...] | None:
        """The inputs after `before_batch` of copies of the callbacks; None, and a warning, if one of them fails."""
        self.failing = ", ".join(type(cb).__name__ for cb in callbacks)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # they will be heard when training says it
            try:
                return self._inputs_after(callbacks)
            except Exception as error:
                failure = repr(error)
        warnings.warn(f"LSUV: {consequence}, because {self.failing} failed on trial: {failure}", stacklevel=2)
        return None

    def _inputs_after(self, callbacks: list[Callback]) -> tuple[Any, ...]:
        stand_in = object.__new__(type(self.learn))
        try:
            copies = self._copies(callbacks, stand_in)
            stand_in._split(apply(_cloned, self.batch))
            for event in EVENTS:
                for cb in copies:
                    self.failing = f"{type(cb).__name__}.{event}"
                    if event != "before_fit" or cb.order >= self.begun:
                        cb(event)
            return tuple(stand_in.xb)
        finally:
            vars(stand_in).clear()  # copies refer to it: the batch would stay until the next garbage collection

    def _is_early(self, cb: Callback) -> bool:
        """Outside a fit the model isn't in the half precision yet for which this one casts the inputs."""
        return isinstance(cb, NonNativeMixedPrecision) and self.begun == -math.inf

    def _copies(self, callbacks: list[Callback], stand_in: Any) -> list[Callback]:
        """Copies of the callbacks, for which the stand-in is the Learner.

        It has what the Learner has, but copies of all that the callbacks' code names (the model, the optimizer, the
        recorder, …), and views of the data loaders, whose data is too large to be copied.
        """
        learn = self.learn
        dls, loaders = _view(learn.dls), [_view(dl) for dl in learn.dls.loaders]
        memo: dict[int, Any] = {id(learn): stand_in, id(learn.dls): dls}
        memo |= {id(dl): view for dl, view in zip(learn.dls.loaders, loaders, strict=True)}
        dls.loaders = loaders
        vars(stand_in).update(vars(learn) | {"dls": dls})
        copies = copy.deepcopy(callbacks, memo)
        named = names_in(callbacks) & vars(learn).keys() - {"dls", "dl", "xb", "yb"}
        vars(stand_in).update({name: copy.deepcopy(vars(learn)[name], memo) for name in named})
        cbs = L(memo.get(id(cb), cb) for cb in learn.cbs)
        vars(stand_in).update({cb.name: cb for cb in cbs}, cbs=cbs, **_at_the_first_batch(dls.train))
        if "model" in named:
            stand_in.model.train()
        return copies


def _at_the_first_batch(dl: Any) -> dict[str, Any]:
    """What a Learner says of itself when its first batch has come."""
    progress = {"epoch": 0, "iter": 0, "train_iter": 0, "pct_train": 0.0, "training": True}
    return {"dl": dl, "n_iter": len(dl) if hasattr(dl, "__len__") else None, **progress}


def _view(obj: T) -> T:
    """An object of the same class with the same attributes. (`copy.copy` would run the class's own code.)"""
    if not hasattr(obj, "__dict__"):
        return copy.copy(obj)
    new = object.__new__(type(obj))
    vars(new).update(vars(obj))
    return new


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _own_autocast() -> Iterator[None]:
    """Leaves the autocast state as it was, whatever was entered and not left."""
    before = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in _DEVICES]
    cache = torch.is_autocast_cache_enabled()
    depth = torch.autocast_increment_nesting()
    try:
        yield
    finally:
        while torch.autocast_decrement_nesting() >= depth:
            pass
        torch.set_autocast_cache_enabled(cache)
        for t, enabled, dtype in before:
            torch.set_autocast_enabled(t, enabled)
            torch.set_autocast_dtype(t, dtype)
