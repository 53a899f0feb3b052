"""`init="auto"`: an initialisation that can be trained, chosen from what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastai_lsuv.core.activation import Activation, activations
from fastai_lsuv.core.attempt import Attempt, attempt
from fastai_lsuv.core.discovery import Discovery
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.verdict import HEALTHY, NOT_JUDGED
from fastai_lsuv.init import delta_orthogonal_, largest_std, looks_linear_

MOST_PASSES = 10  # altogether
_FEWEST = 3  # one that corrects, one that measures, one for the gradient of a large batch
_ALIKE = 0.05  # by how much one activation may differ from another at most, within 3 std


@dataclass(frozen=True)
class Chosen:
    """What was taken, and why."""

    taken: Attempt
    story: str = ""  # to be read after `init="auto"`


def choose(discovery: Discovery, options: Options) -> Chosen:
    """Keep the weights as they are if plain LSUV makes a network of them that trains; else try others, take the best.

    Each is judged by the signal at the end and the gradient at the beginning; none that corrects fewer layers is taken.
    What has been tried leaves no trace.
    """
    dry_run, own = discovery.dry_run, replace(options, init=None)
    n_before = dry_run.n_forward
    plain = attempt(discovery.again(own), own)
    if options.only_measures:
        return Chosen(plain)
    if plain.trainability.verdict in (HEALTHY, NOT_JUDGED):
        return Chosen(plain, f"kept your weights: {plain.trainability.verdict} after plain LSUV")
    # Passes, for the others as well; but where gradients explode so do roundings, and passes are made in vain.
    needed = _FEWEST if plain.trainability.explodes else dry_run.n_forward - n_before
    best, kept, what = plain, dry_run.kept_state(), ""
    for name, candidate in _candidates(discovery, own, needed):
        room = MOST_PASSES - dry_run.n_forward
        if room < needed or best.trainability.score == 1:
            break
        within = replace(candidate, max_iter=max(1, min(options.max_iter, room - _FEWEST)))
        dry_run.begin_again()
        tried = attempt(discovery.again(within), within)
        if tried.n_right >= plain.n_right and tried.trainability.score > best.trainability.score:
            best, kept, what = tried, dry_run.kept_state(), name
    dry_run.restore(kept)
    if best is plain:
        return Chosen(plain, "kept your weights: nothing that was tried is better")
    return Chosen(best, f"chose {what} (after plain LSUV: {plain.trainability.verdict})")


def _candidates(discovery: Discovery, options: Options, needed: int) -> Iterator[tuple[str, Options]]:
    """Ways to initialise that are worth a try, by name."""

    def may_look() -> bool:  # it takes a pass, and then there should be some left to try what was found
        return discovery.dry_run.n_forward + 1 + needed <= MOST_PASSES

    if not options.residual and options.std is not None and may_look() and discovery.branch_ends:
        yield "residual=True", replace(options, residual=True)
    if not may_look():
        return
    factor = _critical_std(discovery)
    std = None if options.std is None else options.std * factor
    with_std = "" if std == options.std else f", std={std:.2g}"
    yield f"looks_linear_{with_std}", replace(options, init=looks_linear_, std=std)
    yield f"delta_orthogonal_{with_std}", replace(options, init=delta_orthogonal_, std=std)


def _critical_std(discovery: Discovery) -> float:
    """The std with which gradients come through mirrored layers with the activations that are found; 1 if none is."""
    modules = [layer.module for layer in discovery.layers if layer.before]
    try:
        found = activations(discovery.dry_run, modules)
        with torch.device("cpu"):  # where what is found lies, whatever the default device
            groups = _groups(found)
            return largest_std([(act, round(n * len(modules) / len(found))) for act, n in groups]) if groups else 1.0
    except Exception:  # a model that can't run on a few samples, an activation that is flat at 0: measuring will tell
        return 1.0


def _groups(found: list[Activation]) -> list[tuple[Activation, int]]:
    """Activations that a mirrored pair of channels shows, and how many of each there are."""
    groups: list[tuple[Activation, int]] = []
    for act in filter(_has_odd_part, found):
        i = next((i for i, (other, _) in enumerate(groups) if _are_alike(act, other)), None)
        if i is None:
            groups.append((act, 1))
        else:
            groups[i] = groups[i][0], groups[i][1] + 1
    return groups


def _are_alike(one: Activation, other: Activation) -> bool:
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    return bool((one(z) - other(z)).abs().max() < _ALIKE)


def _has_odd_part(act: Activation) -> bool:
    """Whether a mirrored pair of channels shows anything: of |z| and z² it doesn't."""
    z = torch.linspace(0, 3, 61, dtype=torch.float64)
    return bool((act(z) - act(-z)).abs().max() > _ALIKE)
