"""Whether a network can be trained, by what is measured before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastai_lsuv.core.options import AUTO, Options
from fastai_lsuv.core.signal import SIGNAL_LOST
from fastai_lsuv.core.statistics import Measured

EXPLODES = 12.0  # excess at the first layers beyond which a network without norms trains badly: by experiment, too
VANISHES = 1e-3
ENOUGH, STEEP = 0.35, 4.0  # signal at the end and excess, of which more and less, respectively, are no better
DEAD = 1e-6  # std of an output beside the largest of any layer's: nothing comes through, whatever it shows
_LAYERS_TO_A_NORM = 4  # at most, if norms hold the scale
_EARLY = 4  # a quarter of the layers is where a gradient arrives

HEALTHY = "healthy"


@dataclass(frozen=True)
class Trainability:
    """What is known of the layers of a network, in the order in which they run; NaN where nothing is."""

    names: Sequence[str]
    seen: Sequence[Measured]
    excess: Sequence[float]  # of the gradient at each output, over what a linear network has
    n_norms: int  # normalisation layers

    @property
    def norms_hold_the_scale(self) -> bool:
        """Whether there is a norm for every few layers: a gradient's size says nothing then."""
        return self.n_norms * _LAYERS_TO_A_NORM >= len(self.names)

    @property
    def last_signal(self) -> float:
        """What is left at the end: at the last layer or the last hidden one, as the last may add a mean of its own."""
        return max([s for s, _ in self._signals()[-2:]], default=math.nan)

    @property
    def early_gradient(self) -> tuple[float, str]:
        """The largest excess at the first layers, and where it is."""
        known = [(g, name) for g, name in zip(self.excess, self.names, strict=True) if math.isfinite(g) and g > 0]
        return max(known[: -(-len(known) // _EARLY)], default=(math.nan, ""))

    @property
    def verdict(self) -> str:
        """`healthy`, or what is lost, and where; where nothing is known, nothing is said against the network."""
        if self.last_signal < SIGNAL_LOST:
            return f"signal lost from {self._lost_from()} on"
        gradient, name = self.early_gradient
        if gradient > EXPLODES and not self.norms_hold_the_scale:
            return f"gradient explodes towards {name}"
        return f"gradient vanishes towards {name}" if gradient < VANISHES else HEALTHY

    @property
    def score(self) -> float:
        """How well signal and gradient come through, 0 to 1: to compare ways to initialise the same network."""
        gradient = self.early_gradient[0]
        says_something = math.isfinite(gradient) and not self.norms_hold_the_scale
        through = min(1.0, STEEP / gradient, gradient / VANISHES) if says_something else 1.0
        last_hidden = next((s for s, _ in self._signals()[-2:]), 0.0)  # a head of a few values shows less of it
        return min(1.0, last_hidden / ENOUGH) * through

    def _signals(self) -> list[tuple[float, str]]:
        """What is left of the input in each output, where that is known."""
        largest = max((max(x.std) for x in self.seen), default=0.0)
        left = [0.0 if 0 < max(x.std) < DEAD * largest else _left(x) for x in self.seen]
        return [(s, name) for s, name in zip(left, self.names, strict=True) if not math.isnan(s)]

    def _lost_from(self) -> str:
        """The first layer behind which the signal doesn't come back."""
        first = ""
        for s, name in reversed(self._signals()):
            if s >= SIGNAL_LOST:
                break
            first = name
        return first


def _left(x: Measured) -> float:
    """The share of the std that is due to the input, less what outputs on one line have of it."""
    return x.signal if math.isnan(x.spread) else x.signal * x.spread


def remedy(found: Trainability, options: Options) -> str:
    """Return what to do about a verdict, or why there is little to gain; empty where there is nothing to say."""
    if found.verdict == HEALTHY:
        return "norms hold the scale: little to gain" if found.norms_hold_the_scale else ""
    if options.init == AUTO:
        return "nothing that was tried is better: fewer layers, norms or shortcuts would help"
    return 'init="auto" looks for better weights'
