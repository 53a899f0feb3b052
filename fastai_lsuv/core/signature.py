"""Where two modules can't differ in what their parameters are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def signature(module: nn.Module, call: Any) -> tuple[Any, ...] | None:
    """Return what decides how a module uses its parameters: what holds of one with the same signature holds of it.

    That is its types, its plain attributes and the shapes of its parameters and inputs. None if it can't be told:
    buffers may be masks, hooks ahead of the forward may make the weight.
    """
    if any(m._forward_pre_hooks or m._buffers for m in module.modules()):
        return None
    internal = vars(nn.Module()).keys()
    attributes = [
        (name, type(m), *((key, _kind(value)) for key, value in sorted(vars(m).items()) if key not in internal))
        for name, m in module.named_modules()
    ]
    parameters = [(name, _kind(p)) for name, p in module.named_parameters()]
    found = (tuple(attributes), tuple(parameters), tuple(_kind(o) for o in tree_leaves(call)))
    try:
        hash(found)
    except TypeError:
        return None
    return found


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return tuple(_kind(o) for o in value) if isinstance(value, (tuple, list)) else value
