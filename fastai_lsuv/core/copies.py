"""A deep copy of a model, or of what it is called with, on which passes run so that the original is never at risk."""

from __future__ import annotations

import copyreg
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastai_lsuv.core.modules import plain

T = TypeVar("T")
Memo = dict[int, Any]  # the copy of each object, by the object's id

_IMMUTABLE = frozenset({
    int, float, complex, str, bytes, bool, type(None), type, CodeType, ModuleType, BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
})  # fmt: skip
# What every module has: hooks, parameters, children, by name.
_REGISTRIES = {name: type(value) for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}
# Where classes are written whose objects a model may refer to, but which are no part of it: data, who trains it, and
# what other threads and processes wait at.
_NO_PARTS = ("torch.utils.data.", "fastai.data.", "fastai.learner.Learner.",
             "threading.", "queue.", "multiprocessing.", "concurrent.", "asyncio.")  # fmt: skip


def copied(original: T, memo: Memo | None = None) -> T:
    """Return a deep copy of a model or anything else.

    As `copy.deepcopy` makes it, with these differences. What can't be copied (a lock, an open file) is shared, and so
    are data sets and Learners. Tensors come detached from their graph. Functions and weak references that lead to
    modules of the model, or to what is in `memo`, lead to the copies. A module that is compiled or spread over devices
    is copied as a plain one.

    `memo` has copies that exist already, by the `id` of the original, and gets all others.

    Raises:
        Exception: whatever a module raises that refuses to be copied.
    """
    memo = {} if memo is None else memo
    parts = original.modules() if isinstance(original, nn.Module) else ()
    with torch.no_grad():
        return _Copier(memo, {*memo, *map(id, parts)}).copy(original)


def tensors_in(o: Any) -> Iterator[Tensor]:
    """Yield the tensors of anything that a forward takes or gives: of containers, and of objects of one's own."""
    seen: set[int] = set()

    def visit(o: Any) -> Iterator[Tensor]:
        if isinstance(o, Tensor):
            yield o
        elif type(o) in _IMMUTABLE or isinstance(o, (type, nn.Module)) or id(o) in seen:
            return
        else:
            seen.add(id(o))
            parts = [*o.values()] if isinstance(o, Mapping) else [*o] if isinstance(o, (list, tuple, set)) else []
            slots = (getattr(o, name, None) for base in type(o).__mro__ for name in getattr(base, "__slots__", ()))
            for part in (*parts, *vars(o).values()) if hasattr(o, "__dict__") else (*parts, *slots):
                yield from visit(part)

    yield from visit(o)


class _Copier:
    """Copies each object once."""

    def __init__(self, memo: Memo, parts: set[int]) -> None:
        self.memo = memo
        self.parts = parts  # ids of the modules of the model that is copied, and of what has been before
        self.originals = memo.setdefault(id(memo), [])  # what has been copied must live as long as its id is in use

    def copy(self, o: Any) -> Any:
        """Return the copy of an object, the same each time."""
        if type(o) in _IMMUTABLE or isinstance(o, type):
            return o
        if id(o) not in self.memo:
            self.originals.append(o)
            self._keep(o, self._new(o))
        return self.memo[id(o)]

    def _keep(self, o: T, new: T) -> T:
        """Note the copy of an object, before its parts are copied if these may lead back to it."""
        return self.memo.setdefault(id(o), new)

    def _new(self, o: Any) -> Any:
        kind = type(o)
        if kind is dict or kind is OrderedDict:
            new = self._keep(o, kind())
            for key, value in o.items():
                new[key if type(key) is str else self.copy(key)] = value if value is None else self.copy(value)
            return new
        if kind is list:
            new = self._keep(o, [])
            new.extend(self.copy(part) for part in o)
            return new
        if kind is tuple:
            return tuple(self.copy(part) for part in o)
        if isinstance(o, nn.Module):
            inner = plain(o)
            return self._module(o) if inner is o else self.copy(inner)
        try:
            return self._leads_to_copies(o) if kind in (FunctionType, MethodType, weakref.ref) else self._part(o)
        except RecursionError:
            raise  # half of something is no copy of it
        except Exception:
            self.memo[id(o)] = o  # in place of what may be half made
            return o

    def _module(self, o: nn.Module) -> Any:
        """Copy a module attribute by attribute, whatever it says about copies and pickles."""
        if isinstance(o, (torch.jit.ScriptModule, torch.fx.GraphModule)):  # made of code that is compiled for each
            return self._by_protocol(o)
        new = self._keep(o, object.__new__(type(o)))
        attributes = vars(new)
        for name, value in vars(o).items():
            if type(value) in _IMMUTABLE:
                attributes[name] = value
            elif name in _REGISTRIES and not value and type(value) is _REGISTRIES[name]:
                attributes[name] = self._keep(value, type(value)())  # a dozen in each module, and most are empty
            elif name != "_compiled_call_impl":
                attributes[name] = self.copy(value)
        for name in copyreg._slotnames(type(o)):  # type: ignore[attr-defined]
            if hasattr(o, name):
                object.__setattr__(new, name, self.copy(getattr(o, name)))
        return new

    def _part(self, o: Any) -> Any:
        if isinstance(o, Tensor):
            return _tensor(o)
        if hasattr(type(o), "__del__"):
            return o  # the end of a copy would be taken for that of the original: a file would be closed
        is_part = not any(f"{b.__module__}.{b.__qualname__}.".startswith(_NO_PARTS) for b in type(o).__mro__)
        return self._by_protocol(o) if is_part else o

    def _by_protocol(self, o: Any) -> Any:
        """Copy an object as its class would have it copied or pickled."""
        if hasattr(type(o), "__deepcopy__"):
            return o.__deepcopy__(self.memo)
        recipe = o.__reduce_ex__(4)
        if isinstance(recipe, str):  # the name of a global
            return o
        make, args, state, items, pairs = (*recipe, None, None, None)[:5]
        new = make(*(self.copy(arg) for arg in args))
        if new is o:  # there is only one of its kind
            return o
        self._keep(o, new)
        if state is not None:
            _set_state(new, self.copy(state))
        for item in items or ():
            new.append(self.copy(item))
        for key, value in pairs or ():
            new[self.copy(key)] = self.copy(value)
        return new

    def _leads_to_copies(self, o: Any) -> Any:
        """A bound method, weak reference or closure that leads to the copies of what the given one leads to."""
        if isinstance(o, MethodType):
            return MethodType(o.__func__, self.copy(o.__self__))
        if isinstance(o, weakref.ref):
            return weakref.ref(self.copy(o())) if self._is_part(o()) else o
        cells = [CellType(self.copy(c.cell_contents)) if _is_full(c) and self._is_part(c.cell_contents) else c
                 for c in o.__closure__ or ()]  # fmt: skip
        defaults, keywords = (self.copy(d) if self._is_part(d) else d for d in (o.__defaults__, o.__kwdefaults__))
        before = (*(o.__closure__ or ()), o.__defaults__, o.__kwdefaults__)
        if all(new is old for new, old in zip((*cells, defaults, keywords), before, strict=True)):
            return o
        new = self._keep(o, FunctionType(o.__code__, o.__globals__, o.__name__, defaults, tuple(cells)))
        vars(new).update(vars(o))
        new.__kwdefaults__ = keywords
        return new

    def _is_part(self, o: Any) -> bool:
        """Whether something is or leads to a module or parameter of the model."""
        if isinstance(o, (list, tuple, dict)):
            return any(self._is_part(part) for part in (o.values() if isinstance(o, dict) else o) if part is not o)
        if isinstance(o, partial):
            return self._is_part((o.func, *o.args, *o.keywords.values()))
        owner = o.__self__ if isinstance(o, MethodType) else o
        known = id(owner) in self.parts or id(owner) in self.memo
        return known or (isinstance(o, FunctionType) and self.copy(o) is not o)


def _is_full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _tensor(t: Tensor) -> Tensor:
    if type(t) is nn.Parameter:
        new: Tensor = nn.Parameter(t.clone(), t.requires_grad)
    elif isinstance(t, nn.Parameter):
        new = t.__deepcopy__({})
    else:
        new = t.clone().requires_grad_(t.requires_grad and t.is_leaf)
    vars(new).update(vars(t))
    return new


def _set_state(new: Any, state: Any) -> None:
    if hasattr(type(new), "__setstate__"):
        new.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if attributes:
        vars(new).update(attributes)
    for name, value in (slots or {}).items():
        object.__setattr__(new, name, value)
