"""Whose parameters are used by whom, and why a layer that uses some is not corrected."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastai_lsuv.core.affine import AFFINE_TYPES, GAIN_TYPES, RECURRENT_TYPES, is_known_affine
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.core.modules import containers, is_scripted
from fastai_lsuv.core.products import Weights
from fastai_lsuv.core.reasons import Skip
from fastai_lsuv.core.watch import Seen, Watch

_TABLES = (nn.Embedding, nn.EmbeddingBag)  # may be used beside their own forward: as a decoder, as centres


def is_uncertain(module: nn.Module) -> bool:
    """True if a module has parameters of its own and its type doesn't tell what becomes of them."""
    own = [p for p in module._parameters.values() if p is not None]
    known = isinstance(module, (*GAIN_TYPES, *RECURRENT_TYPES)) and not isinstance(module, _TABLES)
    return bool(own) and not (known or is_scripted(module) or is_known_affine(module))


def own_of_root(dry_run: DryRun) -> set[Tensor]:
    """Return the parameters that only the model's own forward can use."""
    root = dry_run.model
    its_own = [root, *containers(root)]
    if is_parametrized(root):
        its_own += root.parametrizations.modules()  # type: ignore[union-attr]
    return {p for m in its_own if m in dry_run.names for p in dry_run.working(m).values() if p is not None}


def is_any_used_by_root(dry_run: DryRun, watch: Watch) -> bool:
    """True if a layer's forward didn't run, though the model's own asked for one of its parameters."""
    return any(m not in watch.seen and m in dry_run.names and is_known_affine(m) for m in watch.read)


def home_of(which: Weights, dry_run: DryRun, called: Collection[nn.Module]) -> tuple[nn.Module | None, list[str]]:
    """Return the innermost module that ran whose parameters these are, and their names there."""
    by_name = {name: m for m, name in dry_run.names.items()}
    found = {p: f"{name}.{key}" if name else key for m, name in dry_run.names.items() if not is_scripted(m)
             for key, p in dry_run.working(m).items() if p in which}  # fmt: skip
    path = next(iter(found.values()), "")
    while path:
        path = path.rpartition(".")[0]
        if by_name.get(path) in called:
            inside = [name for name in found.values() if name.startswith(path)]
            return by_name[path], sorted(name[len(path) + 1 :] if path else name for name in inside)
    return None, []


def why_not(module: nn.Module, seen: Seen, is_chosen: bool) -> Skip | None:
    """Return why a module that ran can't be corrected, if so; one that the user chose is tried as a block."""
    if isinstance(module, RECURRENT_TYPES):
        return Skip.RECURRENT
    if seen.is_transformed:
        return Skip.TRANSFORMED
    if seen.affine is not None or seen.gain is not None or is_chosen or _can_be_tried(module, seen):
        return None
    weights = [p for which in seen.multiplied for p in which]
    if any(p.is_complex() for p in weights):
        return Skip.COMPLEX
    several = Skip.SEVERAL if len(weights) > 1 else Skip.NOT_AFFINE
    return Skip.TIED if isinstance(module, GAIN_TYPES) else several


def _can_be_tried(module: nn.Module, seen: Seen) -> bool:
    """Whether it is of a layer's type and has one weight, through which it may be corrected as a block."""
    is_layer = isinstance(module, AFFINE_TYPES) and seen.moments is not None
    weights = [p for which in seen.multiplied for p in which]
    has_one = module._parameters.get("weight") is not None or len(weights) == 1
    return is_layer and has_one and not any(p.is_complex() for p in weights)
