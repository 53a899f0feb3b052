"""The modules of a model by their plain names, whatever compiles them or spreads them over devices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def plain(module: nn.Module) -> nn.Module:
    """Return the module inside whatever compiles it or spreads it over devices, in whatever order."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return plain(module.module)
    return plain(module._modules["_orig_mod"]) if "_orig_mod" in module._modules else module  # type: ignore[arg-type]


def named_modules(model: nn.Module, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules as `model.named_modules()` of the plain model does, without wrappers.

    A module that is in several places comes under the first of its names, or under `every_name`.
    """
    return _visit(model, "", (), None if every_name else set())


def _visit(
    module: nn.Module, name: str, above: tuple[nn.Module, ...], seen: set[nn.Module] | None
) -> Iterator[tuple[str, nn.Module]]:
    module = plain(module)
    if module in (above if seen is None else seen):
        return
    if seen is not None:
        seen.add(module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _visit(child, f"{name}.{key}" if name else key, (*above, module), seen)


def is_scripted(module: nn.Module) -> bool:
    """True if TorchScript runs the module: no hook of it fires, and its insides are out of Python's reach."""
    return isinstance(module, torch.jit.ScriptModule)


def open_modules(root: nn.Module) -> list[nn.Module]:
    """Return all modules but scripted ones."""
    return [m for _, m in named_modules(root) if not is_scripted(m)]


def has_parameters(module: nn.Module) -> bool:
    """True if the module or a child of it has a parameter."""
    own = (p is not None for p in module._parameters.values())
    return any(own) or any(has_parameters(child) for child in module.children())


def containers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield lists and dictionaries beneath a module, which have no forward of their own."""
    for child in module.children():
        if not is_scripted(child) and type(child).forward is nn.Module.forward:
            yield child
            yield from containers(child)


def within_reach(module: nn.Module) -> list[nn.Module]:
    """Return the children of a module, and those in containers of it: what its own forward works with."""
    return [plain(child) for m in (module, *containers(module)) for child in m.children()]
