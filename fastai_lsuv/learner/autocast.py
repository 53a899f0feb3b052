"""The autocast in which training calls the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastai.learner import Learner

_DEVICES = ("cpu", "cuda", "mps", "xpu")  # with an autocast of their own


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
