"""What other callbacks make of a batch before the model gets it, found out on copies."""

from __future__ import annotations

import contextlib
import copy
import dis
import io
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.torch_core import apply
from fastcore.foundation import L
from torch import Tensor
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from fastai.learner import Learner

T = TypeVar("T")

_EVENTS = ("before_fit", "before_epoch", "before_train", "before_batch")
_INPUTS = {"xb", "x"}  # as a callback calls them
_DEVICES = ("cpu", "cuda", "mps", "xpu")  # with an autocast of their own


class Replay:
    """The first training batch of a Learner as far as the model: split, rewritten by callbacks, under their autocast.

    Works on a stand-in for the Learner and on copies of those callbacks that rewrite inputs or switch autocast on, so
    that theirs and the Learner's state is as if nothing had happened. All other callbacks (schedulers, loggers,
    progress bars) stay out of it. What fails in a replay is left out, with a warning.
    """

    def __init__(
        self,
        learn: Learner,
        batch: Any,  # as the DataLoader gives it, on the model's device
        begun: float,  # callbacks of a smaller order have had their `before_fit`
    ) -> None:
        self.learn, self.batch, self.begun = learn, batch, begun

    def inputs(self) -> tuple[Any, ...]:
        """What the model will be called with."""
        callbacks = [cb for cb in self.learn.cbs.sorted("order") if rewrites_inputs(cb) and not self._is_early(cb)]
        with _own_autocast():
            stand_in = self._replayed(callbacks, "the inputs are taken as the DataLoader gives them")
        return tuple((stand_in or self._stand_in([])[0]).xb)

    def autocasts(self) -> list[torch.autocast]:
        """The autocast contexts in which the model will be called, one a device type at most."""
        callbacks = [cb for cb in self.learn.cbs.sorted("order") if switches_autocast(cb)]
        with _own_autocast():
            if not callbacks or self._replayed(callbacks, "its autocast is left out") is None:
                return []
            return [torch.autocast(t, torch.get_autocast_dtype(t)) for t in _DEVICES if torch.is_autocast_enabled(t)]

    def _replayed(self, callbacks: list[Callback], consequence: str) -> Any:
        """A stand-in for the Learner after `before_batch` of copies of the callbacks; None if one of them fails."""
        failing = ""
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # they will be heard when training says it
            try:
                failing = ", ".join(type(cb).__name__ for cb in callbacks)
                stand_in, copies = self._stand_in(callbacks)
                for event in _EVENTS:
                    for cb in copies:
                        failing = f"{type(cb).__name__}.{event}"
                        if event != "before_fit" or cb.order >= self.begun:
                            cb(event)
                return stand_in
            except Exception as error:
                failure = error
        warnings.warn(
            f"LSUV: {consequence}, because {failing} failed when it was tried on a copy: {failure!r}", stacklevel=2
        )
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
        copies = copy.deepcopy(callbacks, memo)
        new = {id(cb): c for cb, c in zip(callbacks, copies, strict=True)}
        vars(stand_in).update({name: new[id(o)] for name, o in vars(learn).items() if id(o) in new})
        if any("opt" in code.co_names for cb in callbacks for code in _codes(cb, _EVENTS)):
            vars(stand_in).update(opt=copy.deepcopy(learn.opt, memo))
        vars(stand_in).update(cbs=L(new.get(id(cb), cb) for cb in learn.cbs), training=True)
        vars(stand_in).update(dl=stand_in.dls.train, iter=0, train_iter=0, pct_train=0.0, epoch=0)
        stand_in._split(apply(_cloned, self.batch))
        return stand_in, copies


def rewrites_inputs(cb: Callback) -> bool:
    """Whether a callback's `before_batch` may change what the model is called with, as its code says.

    It sets `learn.xb`, or writes into something after having read `xb` (CutMix).
    """
    return any(_sets_inputs(code) or _writes_into_inputs(code) for code in _codes(cb, ["before_batch"]))


def switches_autocast(cb: Callback) -> bool:
    """Whether a callback makes or holds an autocast, as its code and attributes say."""
    holds = any(isinstance(value, torch.autocast) for value in vars(cb).values())
    return holds or any("autocast" in name for code in _codes(cb, dir(type(cb))) for name in code.co_names)


def _sets_inputs(code: CodeType) -> bool:
    sets = any(ins.opname == "STORE_ATTR" and ins.argval == "xb" for ins in dis.get_instructions(code))
    return sets or "_split" in code.co_names or ("setattr" in code.co_names and "xb" in code.co_consts)


def _writes_into_inputs(code: CodeType) -> bool:
    if not _INPUTS & set(code.co_names):
        return False
    in_place_call = any(name.endswith("_") and not name.endswith("__") for name in code.co_names)
    instructions = list(dis.get_instructions(code))
    augmented = any(
        (ins.opname.startswith("INPLACE_") or (ins.opname == "BINARY_OP" and ins.argrepr.endswith("=")))
        and then.opname.startswith(("STORE_FAST", "STORE_SUBSCR"))
        for ins, then in itertools.pairwise(instructions)
    )
    return in_place_call or augmented or any(ins.opname in ("STORE_SUBSCR", "STORE_SLICE") for ins in instructions)


def _codes(cb: Callback, names: Iterable[str]) -> Iterator[CodeType]:
    """Code of these methods and of the functions and methods of their own that they name."""
    kinds = [kind for kind in type(cb).__mro__ if kind not in Callback.__mro__]
    pending = [f for name in names for f in (vars(cb).get(name), *(vars(kind).get(name) for kind in kinds))]
    seen: set[CodeType] = set()
    while pending:
        function = pending.pop()
        if isinstance(function, partial):
            pending += [function.func, *function.args]
        elif isinstance(function, property):
            pending += [function.fget]
        elif isinstance(function, MethodType):
            pending += [function.__func__]
        elif isinstance(function, FunctionType) and function.__code__ not in seen:
            codes = [function.__code__, *_inner(function.__code__)]
            seen.update(codes)
            yield from codes
            named = {name for code in codes for name in code.co_names}
            spaces = [vars(kind) for kind in kinds] + [function.__globals__]
            spaces += [vars(m) for n in named if isinstance(m := function.__globals__.get(n), ModuleType)]
            pending += [space[name] for space in spaces for name in named if name in space]
            pending += [cell.cell_contents for cell in function.__closure__ or ()]


def _inner(code: CodeType) -> Iterator[CodeType]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from _inner(const)


def _tensors_of(opt: Any) -> list[Any]:
    """The parameters and the state of an optimizer: too large to be copied, and not what these callbacks change."""
    if opt is None:
        return []
    states = [getattr(o, "state", None) or {} for o in (opt, getattr(opt, "opt", None))]
    return [*(p for group in opt.param_lists for p in group), *(list(state.values()) for state in states)]


def _shallow_copy(obj: T) -> T:
    """An object of the same class with the same attributes; past `copy.copy`, which runs the class's own code."""
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
