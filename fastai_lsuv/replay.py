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
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastai_lsuv.effects import EVENTS, rewrites_inputs, switches_autocast, uses_optimizer
from fastai_lsuv.rehearsal import ModuleState

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

    def inputs(self) -> tuple[Any, ...]:
        """What the model will be called with."""
        callbacks = [cb for cb in self.cbs if rewrites_inputs(cb) and not self._is_early(cb)]
        with _own_autocast():
            stand_in = self._tried(callbacks, "the inputs are taken as the DataLoader gives them")
        return tuple((stand_in or self._stand_in([])[0]).xb)

    def autocasts(self) -> list[torch.autocast]:
        """The autocast contexts in which the model will be called, one a device type at most."""
        with _own_autocast():
            for cb in self.cbs:
                if switches_autocast(cb):
                    self._tried([cb], "its autocast is left out")
            return [torch.autocast(t, torch.get_autocast_dtype(t)) for t in _DEVICES if torch.is_autocast_enabled(t)]

    def _tried(self, callbacks: list[Callback], consequence: str) -> Any:
        """A stand-in for the Learner after `before_batch` of copies of the callbacks; None if one of them fails."""
        failing = ", ".join(type(cb).__name__ for cb in callbacks)
        with _untouched(self.learn.model), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # they will be heard when training says it
            try:
                stand_in, copies = self._stand_in(callbacks)
                for event in EVENTS:
                    for cb in copies:
                        failing = f"{type(cb).__name__}.{event}"
                        if event != "before_fit" or cb.order >= self.begun:
                            cb(event)
                return stand_in
            except Exception as error:
                failure = error
        warnings.warn(f"LSUV: {consequence}, because {failing} failed on trial: {failure!r}", stacklevel=2)
        return None

    def _is_early(self, cb: Callback) -> bool:
        """Outside a fit the model isn't in the half precision yet for which this one casts the inputs."""
        return isinstance(cb, NonNativeMixedPrecision) and self.begun == -math.inf

    def _stand_in(self, callbacks: list[Callback]) -> tuple[Any, list[Callback]]:
        """A Learner of its own attributes, on the same model and data, and the callbacks' copies that belong to it."""
        learn, stand_in = self.learn, _shallow_copy(self.learn)
        stand_in.dls, loaders = _shallow_copy(learn.dls), [_shallow_copy(dl) for dl in learn.dls.loaders]
        stand_in.dls.loaders = loaders
        memo: dict[int, Any] = {id(o): o for o in (learn.model, *tree_leaves(_tensors_of(learn.opt)))}
        memo |= {id(learn): stand_in, id(learn.dls): stand_in.dls}
        memo |= {id(dl): new for dl, new in zip(learn.dls.loaders, loaders, strict=True)}
        others = [cb for cb in learn.cbs if cb not in callbacks]
        memo |= {id(cb): _shallow_copy(cb, learn=stand_in) for cb in others}
        copies = copy.deepcopy(callbacks, memo)
        vars(stand_in).update({cb.name: memo[id(cb)] for cb in learn.cbs})
        if any(uses_optimizer(cb) for cb in callbacks):
            vars(stand_in).update(opt=copy.deepcopy(learn.opt, memo))
        vars(stand_in).update(cbs=L(memo[id(cb)] for cb in learn.cbs), **_at_the_first_batch(stand_in.dls.train))
        stand_in._split(apply(_cloned, self.batch))
        return stand_in, copies


def _at_the_first_batch(dl: Any) -> dict[str, Any]:
    """What a Learner says of itself when its first batch has come."""
    progress = {"epoch": 0, "iter": 0, "train_iter": 0, "pct_train": 0.0, "training": True}
    return {"dl": dl, "n_iter": len(dl) if hasattr(dl, "__len__") else None, **progress}


def _tensors_of(opt: Any) -> list[Any]:
    """The parameters and the state of an optimizer: too large to be copied, and not what these callbacks change."""
    if opt is None:
        return []
    states = [getattr(o, "state", None) or {} for o in (opt, getattr(opt, "opt", None))]
    return [*(p for group in opt.param_lists for p in group), *(list(state.values()) for state in states)]


def _shallow_copy(obj: T, **others: Any) -> T:
    """An object of the same class with the same attributes, but lists and dicts of its own, and some others.

    Past `copy.copy`, which runs the class's own code.
    """
    if not hasattr(obj, "__dict__"):
        return copy.copy(obj)
    new = object.__new__(type(obj))
    containers = (list, dict, set, L)
    own = {name: copy.copy(value) if isinstance(value, containers) else value for name, value in vars(obj).items()}
    vars(new).update(own | others)
    return new


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """The model in training mode, for callbacks that call it (FGSM); then as before, its gradients, too."""
    state, gradients = ModuleState(model), [(p, p.grad, _cloned(p.grad)) for p in model.parameters()]
    try:
        model.train()
        yield
    finally:
        state.restore()
        for p, grad, value in gradients:
            p.grad = grad if grad is None else grad.copy_(value)


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
