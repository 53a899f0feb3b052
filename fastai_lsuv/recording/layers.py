"""Which layers are recorded."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from fastai_lsuv.core.modules import has_parameters, is_scripted, named_modules, open_modules, plain
from fastai_lsuv.core.selection import Choice, chosen, excluded

# Where PyTorch's classes are at home. What it has without parameters elsewhere only reshapes, pools, pads or drops.
_ACTIVATIONS, _MODULE = nn.ReLU.__module__, nn.Module.__module__


def recorded_layers(model: nn.Module, modules: Choice = None, exclude: Choice = None) -> dict[str, nn.Module]:
    """Return the layers to be recorded by their names, in the order in which they are registered in the plain model.

    Raises:
        ValueError, TypeError: what `modules` or `exclude` mean is not in the model.
    """
    model = plain(model)
    picked = set(layers_by_default(model) if modules is None else chosen(model, modules)) - excluded(model, exclude)
    return {name: module for name, module in named_modules(model) if module in picked and not is_scripted(module)}


def layers_by_default(model: nn.Module) -> list[nn.Module]:
    """Return every leaf but those that PyTorch has for reshaping, pooling, padding and dropping.

    A parametrized layer counts as a leaf. So do activations of any library, which nothing tells from other modules
    without parameters but their output.
    """
    inside = {m for layer in open_modules(model) if is_parametrized(layer) for m in layer.parametrizations.modules()}  # type: ignore[union-attr]
    leaves = [m for m in open_modules(model) if m not in inside and _is_leaf(m)]
    return [m for m in leaves if is_known(m) or _home(m) == _MODULE]


def is_known(module: nn.Module) -> bool:
    """True if a module has parameters or is one of PyTorch's activations, so that it makes what it puts out."""
    return has_parameters(module) or _home(module) == _ACTIVATIONS


def has_matrix(module: nn.Module) -> bool:
    """True if a module has more than gains and biases."""
    return any(p.dim() > 1 for p in module.parameters() if not is_lazy(p))


def _is_leaf(module: nn.Module) -> bool:
    return {name for name, _ in module.named_children()} <= {"parametrizations"}


def _home(module: nn.Module) -> str:
    """The file of PyTorch's `nn` that has the nearest base class of a module: `nn.Module` at last."""
    homes = (base.__module__ for base in type(module).__mro__)
    return next(home for home in homes if home.startswith("torch.nn.modules."))
