"""A copy of a DataLoader from which a batch can be taken without the DataLoader, or its data, noticing."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from functools import partial
from random import Random
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from fastai.learner import Learner
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader

Memo = dict[int, Any]  # the copy of each object, by the object's id

_SHARED = (type, ModuleType, nn.Module, Learner)
# Where classes are written whose objects are at work in the background, or read their file when first looked at.
_ALIVE = ("PIL.", "asyncio.", "concurrent.", "multiprocessing.", "queue.", "tempfile.", "threading.")
_RANDOM = (Random, np.random.Generator, np.random.RandomState, torch.Generator)
_MANY = 1000  # entries; what has more is data, and its entries are shared
_LONG = 2**24  # longer arrays are data rather than indices


def loader_copy(o: Any, memo: Memo | None = None) -> Any:
    """Return a copy of a DataLoader, or of anything that holds some, that shares the data with it.

    Copied is what a batch may leave something in: attributes of objects of any class (whatever the class says about
    pickling), containers, arrays of indices, generators of random numbers. All else is shared.
    """
    memo = {} if memo is None else memo
    if id(o) not in memo:
        try:
            new = _new(o, memo)
        except Exception:  # not every class lets its objects be made in this way
            new = o
        memo.setdefault(id(o), new)
    return memo[id(o)]


def _new(o: Any, memo: Memo) -> Any:
    kind = type(o)
    if isinstance(o, _SHARED) or hasattr(kind, "__del__"):  # the copy's end would be taken for the original's
        return o
    if isinstance(o, _RANDOM):
        return copy.deepcopy(o)
    if isinstance(o, (dict, list, set, deque)) or kind is tuple:
        return _container(o, memo)
    if kind in (FunctionType, MethodType, partial):
        return _function(o, memo)
    if isinstance(o, Iterator) and kind.__module__ in ("builtins", "itertools"):
        return _iterator(o, memo)
    return _object(o, memo) if hasattr(o, "__dict__") and not _is_alive(kind) else o


def _container(o: Any, memo: Memo) -> Any:
    new = memo[id(o)] = copy.copy(o)
    if len(o) > _MANY:
        return new
    if isinstance(o, tuple):
        del memo[id(o)]
        return tuple(loader_copy(value, memo) for value in o)
    if isinstance(o, dict):
        for key, value in o.items():
            dict.__setitem__(new, key, _attribute(value, memo))
    elif not isinstance(o, set):
        values = [loader_copy(value, memo) for value in o]
        new.clear()
        new.extend(values)
    return new


def _function(o: Any, memo: Memo) -> Any:
    """A function that leads to the copies of what the given one leads to."""
    if isinstance(o, partial):
        args, keywords = loader_copy(o.args, memo), loader_copy(o.keywords, memo)
        return partial(loader_copy(o.func, memo), *args, **keywords)
    if isinstance(o, MethodType):
        return MethodType(o.__func__, loader_copy(o.__self__, memo))
    before = [cell.cell_contents for cell in o.__closure__ or ()]
    after = [loader_copy(value, memo) for value in before]
    if all(new is old for new, old in zip(after, before, strict=True)):
        return o
    new = FunctionType(o.__code__, o.__globals__, o.__name__, o.__defaults__, tuple(map(CellType, after)))
    new.__kwdefaults__ = o.__kwdefaults__
    return new


def _iterator(o: Any, memo: Memo) -> Any:
    recipe: Any = o.__reduce__()
    new = recipe[0](*loader_copy(recipe[1], memo))
    for state in recipe[2:]:
        new.__setstate__(loader_copy(state, memo))
    return new


def _object(o: Any, memo: Memo) -> Any:
    new = memo[id(o)] = object.__new__(type(o))
    vars(new).update({name: _attribute(value, memo) for name, value in vars(o).items()})
    if isinstance(o, TorchDataLoader):
        vars(new)["_iterator"] = None  # workers that persist work for the original
    return new


def _attribute(value: Any, memo: Memo) -> Any:
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.size < _LONG:
        return memo.setdefault(id(value), value.copy())
    if type(value) is torch.Tensor and value.dim() == 1 and value.numel() < _LONG:
        return memo.setdefault(id(value), value.clone())
    return loader_copy(value, memo)


def _is_alive(kind: type) -> bool:
    bases = kind.__mro__
    return any(f"{base.__module__}.".startswith(_ALIVE) or vars(base).get("__slots__") for base in bases)
