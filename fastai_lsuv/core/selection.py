"""Which modules a user means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from torch import nn

from fastai_lsuv.core.errors import shown
from fastai_lsuv.core.modules import named_modules, plain

Choice: TypeAlias = (
    type | tuple[type, ...] | str | nn.Module | Sequence[str] | Sequence[nn.Module]
    | Callable[[nn.Module], Iterable[nn.Module]] | None
)  # fmt: skip


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
            f"{option}={shown(choice)}: expected a type or tuple of types, a name or list of names (with wildcards), "
            f"a list of modules, or a function from the model to modules"
        )
    if not found:
        raise ValueError(f"{option}={shown(choice)} selects nothing in {type(model).__name__}")
    return list(dict.fromkeys(found))


def excluded(model: nn.Module, exclude: Choice) -> set[nn.Module]:
    """The modules that `exclude` means, and everything beneath them; an empty list excludes nothing."""
    nothing = exclude is None or (isinstance(exclude, list | tuple) and not exclude)
    return set() if nothing else with_descendants(chosen(model, exclude, "exclude"))


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
        raise TypeError(f"{option}={shown(choice)} returned {shown(result)}: expected modules")
    return list(result)


def _all_are(items: Iterable[object], kind: type) -> bool:
    return all(isinstance(item, kind) for item in items)


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
            raise TypeError(f"{option}: expected modules, got {shown(module)}")
        if plain(module) not in inside:
            raise ValueError(f"{option}: {shown(module)} is not a part of this {type(model).__name__}")
    return [plain(module) for module in modules]  # type: ignore[arg-type]
