"""Watching for weights that are loaded into a model."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, ValuesView
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, finalize, ref

from torch import nn

from fastai_lsuv.core.modules import open_modules
from fastai_lsuv.learner.guards import Decision, Layers, decision_on, keep

if TYPE_CHECKING:
    from fastai.learner import Learner

_HOOKS = "_load_state_dict_post_hooks"


class LoadWatch:
    """Refuses LSUV to a Learner's model once weights are loaded into it or any part of it, by whatever means.

    No hook hangs on the model, for it would be saved with it. Each module that has parameters or buffers gets a view
    of its dictionary of hooks instead, which PyTorch goes through after each load, and which no pickle contains.
    """

    def __init__(self, learn: Learner, model: nn.Module) -> None:
        self.learn, self.model, self.layers = ref(learn), ref(model), Layers.of(model)
        self.views = [_view(m) for m in open_modules(model) if m._parameters or m._buffers]
        for view in self.views:
            view.watches.add(self)

    def note_load(self) -> None:
        """Refuse it, unless it has had LSUV by `learn.lsuv_init` already: weights have been loaded."""
        if (learn := self.learn()) is not None and decision_on(learn) is None:
            keep(learn, Decision(refused="weights were loaded into it"), self.layers)

    def end(self) -> None:
        """Leave the model as it was, unless somebody else watches it, too."""
        for view in self.views:
            view.watches.discard(self)
            view.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return LoadWatch, (self.learn(), self.model())  # copies of a Learner watch their own model


class _HooksInView(UserDict[int, Callable[..., None]]):
    """A module's hooks to be called after loads, as they are, which tells when they are asked for."""

    def __init__(self, module: nn.Module) -> None:
        self.data: OrderedDict[int, Callable[..., None]] = vars(module)[_HOOKS]
        self.module, self.watches = ref(module), WeakSet[LoadWatch]()
        # handles of hooks that are registered meanwhile go through this view: it lives as long as the module
        finalize(module, self.close).atexit = False

    def values(self) -> ValuesView[Callable[..., None]]:
        for watch in self.watches:
            watch.note_load()
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
