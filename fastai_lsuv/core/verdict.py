"""Whether a network can be trained, by what is measured before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastai_lsuv.core.options import AUTO, Options
from fastai_lsuv.core.signal import SIGNAL_LOST

EXPLODES = 1e3  # elasticity at the first layers, beyond which a network without norms doesn't train
VANISHES = 1e-3  # the same, where nothing that they do shows at the output
GOOD_SIGNAL, GOOD_GRADIENT = 0.5, 100.0  # of which more or less, respectively, is no better
_LAYERS_TO_A_NORM = 4  # at most, if norms hold the scale
_EARLY = 4  # a quarter of the layers is where a gradient arrives

HEALTHY = "healthy"


@dataclass(frozen=True)
class Trainability:
    """Signal and gradient of the layers of a network, in the order in which they run; NaN where unknown."""

    names: Sequence[str]
    signal: Sequence[float]  # share of the std that is due to the input
    grad: Sequence[float]  # elasticity of the output
    n_norms: int  # normalisation layers

    @property
    def norms_hold_the_scale(self) -> bool:
        """Whether there is a norm for every few layers: a gradient's size says nothing then."""
        return self.n_norms * _LAYERS_TO_A_NORM >= len(self.names)

    @property
    def last_signal(self) -> float:
        """The signal that is left at the end: of the last layer or the last hidden one, whose mean the last may add."""
        return max(self._known_signal()[-2:], default=(math.nan, ""))[0]

    @property
    def early_grad(self) -> tuple[float, str]:
        """The largest elasticity at the first layers, and where it is."""
        known = [(g, name) for g, name in zip(self.grad, self.names, strict=True) if math.isfinite(g) and g > 0]
        return max(known[: -(-len(known) // _EARLY)], default=(math.nan, ""))

    @property
    def verdict(self) -> str:
        """`healthy`, or what is lost, and where.

        Raises nothing: where nothing is known, nothing is said against the network.
        """
        if self.last_signal < SIGNAL_LOST:
            return f"signal lost from {self._lost_from()} on"
        grad, name = self.early_grad
        if not self.norms_hold_the_scale and grad > EXPLODES:
            return f"gradient explodes towards {name}"
        return f"gradient vanishes towards {name}" if grad < VANISHES else HEALTHY

    @property
    def score(self) -> float:
        """How far signal and gradient come through, 0 to 1: to compare ways to initialise the same network."""
        if math.isnan(self.last_signal):
            return 0.0
        grad = self.early_grad[0]
        through = min(1.0, GOOD_GRADIENT / grad, grad / VANISHES) if math.isfinite(grad) else 1.0
        return min(1.0, self.last_signal / GOOD_SIGNAL) * through

    def _known_signal(self) -> list[tuple[float, str]]:
        return [(s, name) for s, name in zip(self.signal, self.names, strict=True) if not math.isnan(s)]

    def _lost_from(self) -> str:
        """The first layer behind which the signal doesn't come back."""
        first = ""
        for s, name in reversed(self._known_signal()):
            if s >= SIGNAL_LOST:
                break
            first = name
        return first


def remedy(found: Trainability, options: Options) -> str:
    """Return what to do about a verdict, or why there is little to gain; empty where there is nothing to say."""
    if found.verdict == HEALTHY:
        return "norms hold the scale: little to gain" if found.norms_hold_the_scale else ""
    if options.init == AUTO:
        return "nothing that was tried is better: fewer layers, norms or shortcuts would help"
    return 'init="auto" looks for better weights'
