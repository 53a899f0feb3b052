"""What is wrong with a layer, by the numbers that were recorded of it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from fastai_lsuv.core.signal import SIGNAL_LOST

# Rules of the verdicts, rough on purpose: a healthy layer of any architecture is to pass, a broken one is not.
EXPLODING = 1e3  # std that no healthy layer reaches
VANISHING = 1e-3  # std that is nothing beside a bias of default size
CHANGE = 100.0  # by how much the std may grow (from 1 at least) or fall since the first record
DYING = 0.95  # share of outputs that are nothing beside the layer's own std
DEAD = 0.5  # share of units that never fire
SATURATED = 0.35  # share of outputs at the limit of the layer's range: of a sigmoid it could be half
# Size of a step's change beside that of the weight, in the mean over a fit. Of eleven networks (`tests/benchmarks/
# learning_rates.py`) none trains well outside of the first range, and all are at their best within the second.
LEARNING = (3e-5, 0.06)
WORKS = (1e-3, 0.05)
ENOUGH = 10  # records of a fit from which that is told


class Verdict(NamedTuple):
    """What is wrong with a layer, and the number that says so."""

    name: str
    because: str = ""


HEALTHY = Verdict("healthy")
REMEDIES = {  # of all verdicts but `healthy`, the gravest first
    "exploding": "Lower the learning rate, clip gradients, or initialise with LSUV",
    "dying": "Lower the learning rate, or initialise with LSUV",
    "vanishing": "Initialise with LSUVCallback(init='auto'), or init=looks_linear_ if it keeps your weights",
    "dead units": "Lower the learning rate, or use an activation that has a slope on both sides, such as leaky ReLU",
    "too fast": "Lower the learning rate",
    "not learning": "Raise the learning rate, or check that the optimizer has this layer's parameters",
    "saturated": "Initialise with LSUV, or lower the learning rate",
}


@dataclass(frozen=True)
class Facts:
    """What is known of a layer: of all training records ever made, or of its latest."""

    type: str
    is_known: bool  # a layer with parameters or one of PyTorch's activations: others may hand on what they get
    has_parameters: bool
    has_matrix: bool  # a parameter of more than one dimension: gains and biases alone may stay as they are
    first_std: float
    last_std: float
    min_std: float
    max_std: float
    max_near_zero: float
    last_mean: float
    sparsity: float
    at_limit: float
    signal: float
    dead_units: float  # over the last epoch
    last_update: float
    mean_update: float  # mean over the records of the last fit in which anything changed
    n_updates: int  # records of that fit


def verdicts(layers: Sequence[Facts]) -> list[Verdict]:
    """Return the verdict on each layer, in order: the first of these rules that applies to it.

    * `exploding`: the std is above 1,000, above 100 times its first value (and above 100), or not finite.
    * `dying`: 95% of the outputs are negligible, that is, within 5% of the layer's own std around zero.
    * `dead units`: half of an activation's channels did not fire once in an epoch.
    * `vanishing`: the std is below 0.001 or below 1% of its first value; or less than a tenth of it is due to the
      input, here and in all later layers. Only for layers with parameters and PyTorch's activations.
    * `too fast`: on average over a fit, a step changes the layer's weights by more than 6% of their size, and those of
      most other layers as well (a few layers may start so small that they have to change by that much).
    * `not learning`: on average over a fit, a step changes the weights by less than 0.003% of their size. Like
      `too fast`, only for layers with matrices or convolution kernels.
    * `saturated`: the size of 35% of the outputs is within 5% of the largest, as in a tanh or sigmoid whose inputs are
      too large. Only for layers without parameters.
    * `healthy`: none of these holds.
    """
    found: list[Verdict] = []
    is_fast = median([x.mean_update for x in layers if _moves(x)] or [0.0]) > LEARNING[1]
    is_lost = True  # in all later layers
    for layer in reversed(layers):
        if layer.is_known and layer.signal == layer.signal:
            is_lost = is_lost and layer.signal < SIGNAL_LOST
        found.append(_verdict(layer, is_lost, is_fast))
    return found[::-1]


def _moves(x: Facts) -> bool:
    """True if there is something to be said of its updates."""
    return x.has_matrix and x.n_updates >= ENOUGH


def _verdict(x: Facts, is_lost: bool, is_fast: bool) -> Verdict:
    slow, fast = LEARNING
    since = f"std from {x.first_std:.2g} to {x.last_std:.2g}"
    per_step = f"mean update {x.mean_update:.2g}"
    rules = (
        ("exploding", x.last_std > min(EXPLODING, CHANGE * max(x.first_std, 1.0)), since),
        ("dying", x.sparsity >= DYING, f"{x.sparsity:.0%} of outputs negligible"),
        ("dead units", x.is_known and x.dead_units >= DEAD, f"{x.dead_units:.0%} of units never fired"),
        ("vanishing", x.is_known and x.last_std < max(VANISHING, x.first_std / CHANGE), since),
        ("vanishing", x.is_known and is_lost and x.signal < SIGNAL_LOST, f"signal {x.signal:.1%}"),
        ("too fast", _moves(x) and is_fast and x.mean_update > fast, per_step),
        ("not learning", _moves(x) and x.mean_update < slow, per_step),
        ("saturated", not x.has_parameters and x.at_limit >= SATURATED, f"{x.at_limit:.0%} of outputs at the limit"),
    )
    return next((Verdict(name, because) for name, applies, because in rules if applies), HEALTHY)


def diagnosis(layers: Mapping[str, Facts], among: Container[str] = tuple(REMEDIES)) -> str:
    """Return the gravest of these verdicts, the first layer that has it, and a remedy; empty if no layer has any.

    The gravest, because it tends to cause the others: a layer without signal, say, doesn't learn either.
    """
    each = zip(layers, verdicts([*layers.values()]), strict=True)
    found = [(name, verdict) for name, verdict in each if verdict.name in among]
    if not found:
        return ""
    name, gravest = min(found, key=lambda pair: [*REMEDIES].index(pair[1].name))
    more = f"; {len(found) - 1} more layer{'s are' if len(found) > 2 else ' is'} unhealthy" if len(found) > 1 else ""
    return f"{name or '(model)'}: {gravest.name} ({gravest.because}){more}. {REMEDIES[gravest.name]}"
