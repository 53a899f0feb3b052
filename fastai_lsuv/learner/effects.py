"""What a callback will do to a batch on its way to the model, as its code says."""

from __future__ import annotations

import dis
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from fastai.callback.core import Callback

EVENTS = ("before_fit", "before_epoch", "before_train", "before_batch")  # up to the first call of the model
_INPUTS = {"xb", "x"}  # as a callback calls them
_CHANGES = {"pop", "popitem", "update", "clear", "setdefault"}  # of a dict of inputs
_WRITES_OUT = {"print", "open", "write", "writelines", "log", "info", "add_scalar", "add_scalars", "add_image", "dump"}
_ENTERS = {"__enter__", "enter_context", "set_autocast_enabled"}


def rewrites_inputs(cb: Callback) -> bool:
    """Whether the `before_batch` of a callback may change what the model is called with.

    It sets `learn.xb`; or it reads it and changes something in place (CutMix), unless it writes to the outside, too,
    as a logger does, which must not be run for a trial.
    """
    codes = list(_codes(cb, ["before_batch"]))
    if any(_sets_inputs(code) for code in codes):
        return True
    names = {name for code in codes for name in code.co_names}
    return bool(_INPUTS & names) and not _WRITES_OUT & names and any(_changes_in_place(code) for code in codes)


def switches_autocast(cb: Callback) -> bool:
    """Whether a callback makes or holds an autocast, and enters a context before the model is called."""
    enters = any(_ENTERS & set(code.co_names) for code in _codes(cb, EVENTS))
    holds = any(isinstance(value, torch.autocast) for value in vars(cb).values())
    return enters and (holds or any("autocast" in name for code in _codes(cb, dir(type(cb))) for name in code.co_names))


def names_in(callbacks: Iterable[Callback]) -> set[str]:
    """All attributes and globals that the code of callbacks names before the model is called."""
    return {name for cb in callbacks for code in _codes(cb, EVENTS) for name in code.co_names}


def _sets_inputs(code: CodeType) -> bool:
    sets = any(ins.opname == "STORE_ATTR" and ins.argval == "xb" for ins in dis.get_instructions(code))
    return sets or "_split" in code.co_names or ("setattr" in code.co_names and "xb" in code.co_consts)


def _changes_in_place(code: CodeType) -> bool:
    """`x[...] = `, `del x[...]`, `x += `, `x.mul_()`, `f(out=x)`, `x.update()`."""
    if any(_is_in_place(name) for name in code.co_names):
        return True
    if any(isinstance(const, tuple) and "out" in const for const in code.co_consts):  # names of keyword arguments
        return True
    for ins, then in itertools.pairwise(dis.get_instructions(code)):
        if ins.opname in ("STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR"):
            return True
        augments = ins.opname.startswith("INPLACE_") or (ins.opname == "BINARY_OP" and ins.argrepr.endswith("="))
        if augments and then.opname.startswith("STORE_FAST"):
            return True
    return False


def _is_in_place(name: str) -> bool:
    return name in _CHANGES or (name.endswith("_") and not name.endswith("__"))


def _codes(cb: Callback, methods: Iterable[str]) -> Iterator[CodeType]:
    """Code of these methods, and of the functions, methods and held objects of their own that they name."""
    spaces = _spaces(cb)
    pending = [space[name] for name in methods for space in spaces if name in space]
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
            names = {name for code in codes for name in code.co_names}
            pending += _named(names, [*spaces, function.__globals__])
            pending += [cell.cell_contents for cell in function.__closure__ or ()]


def _named(names: set[str], spaces: list[dict[str, Any]]) -> Iterator[Any]:
    """Functions of these names; and of modules and objects of these names, the functions that are named, too."""
    for value in [space[name] for space in spaces for name in names if name in space]:
        yield value
        if isinstance(value, ModuleType):
            yield from (vars(value)[name] for name in names if name in vars(value))
        elif not isinstance(value, (FunctionType, MethodType, partial, property, type)):
            yield from (space[name] for space in _spaces(value) for name in {*names, "__call__"} if name in space)


def _spaces(obj: object) -> list[dict[str, Any]]:
    """Where an object's functions are, those apart that every object or callback has."""
    kinds = [kind for kind in type(obj).__mro__ if kind not in Callback.__mro__]
    return [getattr(obj, "__dict__", {}), *(dict(vars(kind)) for kind in kinds)]


def _inner(code: CodeType) -> Iterator[CodeType]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from _inner(const)
