"""Which modules a user means, and the layer types whose weights need no examination."""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastai_lsuv.core.modules import named_modules, open_modules, plain

Choice: TypeAlias = (
    type | tuple[type, ...] | str | nn.Module | Sequence[str] | Sequence[nn.Module]
    | Callable[[nn.Module], Iterable[nn.Module]] | None
)  # fmt: skip

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# y = Wx + b, W in `weight` and b in `bias`. A shortcut past the probe, which finds the same.
AFFINE_TYPES = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
# Own parameters, but none that is summed over the input: the probe would find the same.
GAIN_TYPES = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip
# Weights that meet what they have put out before, through nonlinear gates: no parameter carries the output's scale.
RECURRENT_TYPES = (nn.RNNBase, nn.RNNCellBase)


def is_known_affine(module: nn.Module) -> bool:
    """Whether `module` computes what PyTorch's own Linear or convolution does, on parameters that are its own.

    Not so: a subclass with a forward of its own, a weight computed from others (weight norm, parametrizations).
    """
    own = module._parameters
    return (
        any(isinstance(module, base) and _computes_as(module, base) for base in AFFINE_TYPES)
        and own.get("weight") is not None
        and "bias" in own
    )


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    methods = ("forward", "_conv_forward", "__call__")
    return not vars(module).keys() & {"forward", "_conv_forward"} and all(
        getattr(type(module), name, None) is getattr(base, name, None) for name in methods
    )


def channel_dim(module: nn.Module, output: Tensor) -> int:
    """Dimension of the output of a known affine layer that counts its channels."""
    if isinstance(module, nn.Linear):
        return output.dim() - 1
    return output.dim() - len(module.kernel_size) - 1  # type: ignore[arg-type]  # batched or not


def per_output_channel(module: nn.Module, factor: Tensor) -> Tensor:
    """One factor for each output channel of a known affine layer, in a shape that multiplies its weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, _TRANSPOSED):  # (in, out/groups, ...): each group of inputs feeds its own outputs
        groups, inputs = module.groups, weight.shape[0] // module.groups
        factor = factor.view(groups, 1, -1).expand(groups, inputs, -1).reshape(weight.shape[:2])
        return factor.reshape(*factor.shape, *[1] * (weight.dim() - 2))
    return factor.reshape(-1, *[1] * (weight.dim() - 1))


def chosen(model: nn.Module, choice: Choice, option: str = "modules") -> list[nn.Module]:
    """Modules of `model` that `choice` (any form that `lsuv_` takes, not None) means.

    Raises:
        ValueError: nothing is meant: a pattern that matches no name, modules that aren't in the model.
        TypeError: not one of the forms.
    """
    if isinstance(choice, type) or (isinstance(choice, tuple) and _all_are(choice, type)):
        found = [m for _, m in named_modules(model) if isinstance(m, choice)]
    elif isinstance(choice, str):
        found = _matching(model, choice, option)
    elif isinstance(choice, nn.Module):
        found = _contained(model, [choice], option)
    elif isinstance(choice, Sequence) and _all_are(choice, str):
        found = [m for pattern in choice for m in _matching(model, str(pattern), option)]
    elif isinstance(choice, Sequence) and _all_are(choice, nn.Module):
        found = _contained(model, choice, option)
    elif callable(choice):
        found = _contained(model, _called(choice, model, option), option)
    else:
        raise TypeError(
            f"{option}={choice!r}: expected a type or tuple of types, a name or list of names (with wildcards), "
            f"a list of modules, or a function from the model to modules"
        )
    if not found:
        raise ValueError(f"{option}={_show(choice)} selects nothing in {type(model).__name__}")
    return list(dict.fromkeys(found))


def excluded(model: nn.Module, exclude: Choice) -> set[nn.Module]:
    """The modules that `exclude` means, and everything beneath them; an empty list excludes nothing."""
    nothing = exclude is None or (isinstance(exclude, list | tuple) and not exclude)
    return set() if nothing else with_descendants(chosen(model, exclude, "exclude"))


def layers_and_activations(model: nn.Module) -> list[nn.Module]:
    """Every leaf with parameters, and every activation; a parametrized layer counts as a leaf."""
    inside = {m for layer in model.modules() if is_parametrized(layer) for m in layer.parametrizations.modules()}  # type: ignore[union-attr]
    leaves = [m for m in open_modules(model) if m not in inside and _is_leaf(m)]
    return [m for m in leaves if next(m.parameters(), None) is not None or is_activation(m)]


def _is_leaf(module: nn.Module) -> bool:
    return {name for name, _ in module.named_children()} <= {"parametrizations"}


def is_activation(module: nn.Module) -> bool:
    """Whether a leaf without parameters is one of `torch.nn`'s activations, or acts like one when tried on numbers.

    That is to say: each output depends on the input in its place alone, and not linearly.
    """
    if type(module).__module__ == nn.Softmax.__module__:
        return True
    if next(module.buffers(), None) is not None:
        return False
    x = torch.linspace(-3.0, 3.0, 8)
    try:
        with torch.no_grad():
            f = copy.deepcopy(module).eval()  # what it may keep of the trial goes with the copy
            y, part, doubled, turned = f(x.clone()), f(x[:5].clone()), f(-2 * x), f(x.flip(0))
            elementwise = y.shape == x.shape and torch.equal(y[:5], part) and torch.equal(y.flip(0), turned)
            return bool(elementwise and not torch.allclose(doubled, -2 * y))
    except Exception:  # it wants other inputs: no activation takes only those
        return False


def names_in(choice: Choice) -> list[str]:
    """The names and patterns that a choice consists of; none if it is of another form."""
    listed = [choice] if isinstance(choice, str) else choice if isinstance(choice, Sequence) else []
    return [name for name in listed if isinstance(name, str)]


def is_pattern(name: str) -> bool:
    """Whether a name has wildcards."""
    return any(c in name for c in "*?[")


def with_descendants(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Return the modules and everything beneath them."""
    return {inner for module in modules for _, inner in named_modules(module)}


def _called(choice: Callable[[nn.Module], Iterable[nn.Module]], model: nn.Module, option: str) -> list[nn.Module]:
    result = choice(model)
    if not isinstance(result, Iterable):
        raise TypeError(f"{option}={_show(choice)} returned {result!r}: expected modules")
    return list(result)


def _all_are(items: Iterable[object], kind: type) -> bool:
    return all(isinstance(item, kind) for item in items)


def _show(choice: Choice) -> str:
    return getattr(choice, "__qualname__", None) or repr(choice)


def _matching(model: nn.Module, pattern: str, option: str) -> list[nn.Module]:
    named = {name: m for name, m in named_modules(model, every_name=True) if name}
    if not is_pattern(pattern):
        found = [named[pattern]] if pattern in named else []
    else:
        found = [m for name, m in named.items() if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, named, n=1, cutoff=0.0)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        raise ValueError(f"{option}={pattern!r} matches no module of {type(model).__name__}{hint}")
    return found


def _contained(model: nn.Module, modules: Sequence[object], option: str) -> list[nn.Module]:
    inside = {m for _, m in named_modules(model)}
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{option}: expected modules, got {module!r}")
        if plain(module) not in inside:
            raise ValueError(f"{option}: {module!r} is not a part of this {type(model).__name__}")
    return [plain(module) for module in modules]  # type: ignore[arg-type]
