"""Forward hooks that always go away."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@contextmanager
def hooked(
    after: Mapping[nn.Module, Hook],  # called with (module, args, kwargs, output); a result that isn't None replaces it
    before: Mapping[nn.Module, PreHook] | None = None,  # called with (module, args, kwargs) ahead of the forward
) -> Iterator[None]:
    """Hang forward hooks on modules for the length of a `with` block, whatever ends it.

    They run ahead of every hook that is there already, so that they see a module's own output, and other hooks what
    they make of it.
    """
    with ExitStack() as handles:
        for module, pre_hook in (before or {}).items():
            handle = module.register_forward_pre_hook(pre_hook, prepend=True, with_kwargs=True)
            handles.callback(handle.remove)
        for module, hook in after.items():
            handles.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        yield


def eagerly() -> AbstractContextManager[Any]:
    """Compiled modules run as plain ones: every hook fires, and nothing is compiled for the sake of a few passes."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and to import it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
