"""What is in force when training calls the model: its modes and switches, and the autocast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from fastai.learner import Learner

_DEVICES = ("cpu", "cuda", "mps", "xpu")  # with an autocast of their own


def switches(model: nn.Module, copies: Mapping[int, Any]) -> AbstractContextManager[None]:
    """Return a context in which the modules of a model are in the modes in which their copies are now.

    That is: have the same flags, names and numbers as attributes (`training`; which of two networks runs).
    """
    changes = []
    for module in model.modules():
        copy = copies.get(id(module))
        if type(copy) is type(module):  # a module that compiles another has a copy of that other
            now = vars(module)
            changes += [(now, name, value) for name, value in vars(copy).items() if _is_another(name, value, now)]
    return _set(changes)


def _is_another(name: str, value: Any, attributes: Mapping[str, Any]) -> bool:
    is_switch = name in attributes and not name.startswith("_") and type(value) in (bool, int, float, str)
    return is_switch and bool(value != attributes[name])


@contextmanager
def _set(changes: list[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    before = [(attributes, name, attributes[name]) for attributes, name, _ in changes]
    try:
        for attributes, name, value in changes:
            attributes[name] = value
        yield
    finally:
        for attributes, name, value in before:
            attributes[name] = value


def autocasts(learn: Learner) -> list[torch.autocast]:
    """Return contexts for the autocast that is in force now and will be inside the model, at most one a device type."""
    with own_autocast(), ExitStack() as stack:
        for cb in learn.cbs:
            if (accelerator := vars(cb).get("accelerator")) is not None:  # it will wrap the model's forward
                stack.enter_context(accelerator.autocast())
        return [torch.autocast(t, torch.get_autocast_dtype(t)) for t in _DEVICES if torch.is_autocast_enabled(t)]


@contextmanager
def own_autocast() -> Iterator[None]:
    """Leave the autocast state as it was, whatever is entered in the block and not left."""
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
