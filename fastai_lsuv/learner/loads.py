"""Watching for weights that are loaded into a model."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterable, ValuesView
from typing import Any
from weakref import WeakSet, finalize, ref

from torch import nn

from fastai_lsuv.core.modules import open_modules

_HOOKS = "_load_state_dict_post_hooks"


def was_loaded(model: nn.Module) -> bool:
    """True if weights were loaded into the model or any part of it, by whatever means, while it was watched."""
    views = (vars(m)[_HOOKS] for m in open_modules(model))
    return any(isinstance(view, _HooksInView) and view.loaded for view in views)


class LoadWatch:
    """Has modules remember that weights were loaded into them.

    No hook hangs on the model, for it would be saved with it. Each module that has parameters or buffers gets a view
    of its dictionary of hooks instead, which PyTorch goes through after each load, and which no pickle contains.
    """

    def __init__(self, modules: Iterable[nn.Module], loaded: bool = False) -> None:
        self.views = [_view(m) for m in modules if m._parameters or m._buffers]
        for view in self.views:
            view.watches.add(self)
            view.loaded |= loaded

    @property
    def loaded(self) -> bool:
        """True if weights were loaded into any of them."""
        return any(view.loaded for view in self.views)

    def end(self) -> None:
        """Leave the modules as they were, unless something else also watches them."""
        for view in self.views:
            view.watches.discard(self)
            view.close()

    def abandon(self) -> None:
        """End, unless the modules have something to remember for those who watch them next."""
        if not self.loaded:
            self.end()

    def __reduce__(self) -> tuple[Any, ...]:
        modules = [m for view in self.views if (m := view.module()) is not None]
        return LoadWatch, (modules, self.loaded)  # copies of a Learner watch their own model


class _HooksInView(UserDict[int, Callable[..., None]]):
    """A module's hooks to be called after loads, as they are, which remembers that they were asked for."""

    def __init__(self, module: nn.Module) -> None:
        self.data: OrderedDict[int, Callable[..., None]] = vars(module)[_HOOKS]
        self.module, self.watches, self.loaded = ref(module), WeakSet[LoadWatch](), False
        # handles of hooks that are registered meanwhile go through this view: it lives as long as the module
        finalize(module, self.close).atexit = False

    def values(self) -> ValuesView[Callable[..., None]]:
        self.loaded = True
        return self.data.values()

    def close(self) -> None:
        module = self.module()
        if module is not None and not self.watches and vars(module)[_HOOKS] is self:
            vars(module)[_HOOKS] = self.data

    def __reduce__(self) -> Any:
        return self.data.__reduce__()


def _view(module: nn.Module) -> _HooksInView:
    hooks = vars(module)[_HOOKS]
    if not isinstance(hooks, _HooksInView):
        hooks = vars(module)[_HOOKS] = _HooksInView(module)
    return hooks
