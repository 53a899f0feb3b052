"""`init="auto"`: an initialisation that can be trained, chosen from what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastai_lsuv.core.activation import Activation, activations
from fastai_lsuv.core.attempt import Attempt, attempt
from fastai_lsuv.core.discovery import Discovery
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.verdict import HEALTHY
from fastai_lsuv.init import delta_orthogonal_, largest_std, looks_linear_

MOST_PASSES = 10  # altogether
_OF_AN_ATTEMPT = 2  # passes: one that corrects, and one that measures
_ALIKE = 0.05  # by how much one activation may differ from another at most, within 3 std


@dataclass(frozen=True)
class Chosen:
    """What was taken, and why."""

    taken: Attempt
    story: str = ""


def choose(discovery: Discovery, options: Options) -> Chosen:
    """Keep the weights as they are if plain LSUV makes a network of them that trains; else try others, take the best.

    Each is judged by the signal at the end and the gradient at the beginning. What has been tried leaves no trace.
    """
    plain_options = replace(options, init=None)
    plain = attempt(discovery.again(plain_options), plain_options)
    if plain.trainability.verdict == HEALTHY or options.only_measures:
        return Chosen(plain, "your own weights" if not options.only_measures else "")
    dry_run = discovery.dry_run
    best, kept, what = plain, dry_run.kept_state(), ""
    for name, candidate in _candidates(discovery, plain_options):
        if dry_run.n_forward + _OF_AN_ATTEMPT > MOST_PASSES or best.trainability.score == 1:
            break
        dry_run.begin_again()
        tried = attempt(discovery.again(candidate), candidate)
        if tried.trainability.score > best.trainability.score:
            best, kept, what = tried, dry_run.kept_state(), name
    dry_run.restore(kept)
    if best is plain:
        return Chosen(plain, "your own weights, as nothing tried is better")
    return Chosen(best, f"{what}; with your own weights: {plain.trainability.verdict}")


def _candidates(discovery: Discovery, options: Options) -> Iterator[tuple[str, Options]]:
    """Ways to initialise that are worth a try, by name."""
    if not options.residual and options.std is not None and discovery.branch_ends:
        yield "residual=True", replace(options, residual=True)
    modules = [layer.module for layer in discovery.layers if layer.before]
    factor = _critical_std(activations(discovery.dry_run, modules), len(modules))
    std = None if options.std is None else options.std * factor
    with_std = "" if std == options.std else f", std={std:.2g}"
    yield f"looks_linear_{with_std}", replace(options, init=looks_linear_, std=std)
    yield f"delta_orthogonal_{with_std}", replace(options, init=delta_orthogonal_, std=std)


def _critical_std(found: list[Activation], n_layers: int) -> float:
    """The std with which gradients come through mirrored layers with these activations, in the proportion found."""
    groups: list[tuple[Activation, int]] = []
    for act in found:
        i = next((i for i, (other, _) in enumerate(groups) if _are_alike(act, other)), None)
        if i is None:
            groups.append((act, 1))
        else:
            groups[i] = groups[i][0], groups[i][1] + 1
    behind = [(act, round(n * n_layers / len(found))) for act, n in groups if _has_odd_part(act)]
    return largest_std(behind) if behind else 1.0


def _are_alike(one: Activation, other: Activation) -> bool:
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    return bool((one(z) - other(z)).abs().max() < _ALIKE)


def _has_odd_part(act: Activation) -> bool:
    """Whether a mirrored pair of channels shows anything: of |z| and z² it doesn't."""
    z = torch.linspace(0, 3, 61, dtype=torch.float64)
    return bool((act(z) - act(-z)).abs().max() > _ALIKE)


