"""Whether a network can be trained, by what is measured before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastai_lsuv.core.options import AUTO, Options
from fastai_lsuv.core.signal import SIGNAL_LOST

# By experiment, as is `SIGNAL_LOST` (`nbs/study.py`): by how much a gradient may grow or shrink on its way to the first
# layers of a network without norms, beside a linear one.
EXPLODES, VANISHES = 12.0, 1e-3
ENOUGH, STEEP = 0.35, 4.0  # signal at the end and growth, of which more and less, respectively, are no better
_LAYERS_TO_A_NORM = 4  # at most, if norms hold the scale
_EARLY = 0.25  # of the layers: where a gradient arrives

HEALTHY, NOT_JUDGED = "healthy", "not judged"


@dataclass(frozen=True)
class Evidence:
    """What one layer's output tells; NaN where nothing is known."""

    name: str
    signal: float  # share of the std that is due to the input, less what a few directions have of it, 0 to 1
    growth: float  # of a gradient from the network's output to here, beside that in a linear network


@dataclass(frozen=True)
class Trainability:
    """What is known of the layers of a network, in the order in which they run."""

    evidence: Sequence[Evidence]  # none: nothing is known
    n_norms: int  # normalisation layers

    @property
    def norms_hold_the_scale(self) -> bool:
        """Whether there is a norm for every few layers: a gradient's size says nothing then."""
        return bool(self.evidence) and self.n_norms * _LAYERS_TO_A_NORM >= len(self.evidence)

    @property
    def last_signal(self) -> float:
        """The larger signal of the last two layers: a head may add a mean to what the layer before has."""
        return max([x.signal for x in self._with_signal()[-2:]], default=math.nan)

    @property
    def lost_from(self) -> str | None:
        """The first layer from which on the signal is lost, if it is."""
        first = None
        if self.last_signal < SIGNAL_LOST:
            for x in reversed(self._with_signal()):
                if x.signal >= SIGNAL_LOST:
                    break
                first = x.name
        return first

    @property
    def is_lost_at_once(self) -> bool:
        """Whether there is none in any layer."""
        return self.lost_from is not None and self.lost_from == self._with_signal()[0].name

    @property
    def steepest(self) -> Evidence | None:
        """Of the first layers the one to which a gradient grows most, where that is known."""
        known = [x for x in self.evidence if math.isfinite(x.growth)]
        return max(known[: math.ceil(_EARLY * len(known))], key=lambda x: x.growth, default=None)

    @property
    def explodes(self) -> bool:
        """Whether a gradient grows so much on its way to the first layers that the network is chaotic."""
        return self.steepest is not None and self.steepest.growth > EXPLODES and not self.norms_hold_the_scale

    @property
    def verdict(self) -> str:
        """What is lost and where, or `healthy`; `not judged` if no signal could be measured and no gradient is lost."""
        if self.lost_from is not None:
            return f"signal lost from {self.lost_from} on"
        if self.steepest is not None and self.explodes:
            return f"gradient explodes towards {self.steepest.name}"
        if self.steepest is not None and self.steepest.growth < VANISHES:
            return f"gradient vanishes towards {self.steepest.name}"
        return HEALTHY if self._with_signal() else NOT_JUDGED

    @property
    def score(self) -> float:
        """How well signal and gradient come through, 0 to 1: to compare ways to initialise the same network."""
        if not self._with_signal():
            return 0.0
        growth = STEEP if self.steepest is None or self.norms_hold_the_scale else self.steepest.growth
        through = min(1.0, STEEP / growth, growth / VANISHES) if growth else 0.0
        last_hidden = self._with_signal()[-2:][0].signal  # a head of a few values shows less of it
        return min(1.0, last_hidden / ENOUGH) * through

    def _with_signal(self) -> list[Evidence]:
        return [x for x in self.evidence if not math.isnan(x.signal)]


def remedy(found: Trainability, options: Options) -> str:
    """Return what to do about a verdict, or why there is little to gain; empty where there is nothing to say."""
    if found.verdict == HEALTHY:
        return "norms hold the scale: little to gain" if found.norms_hold_the_scale else ""
    if found.verdict == NOT_JUDGED:
        return "the signal can only be measured on several inputs" if found.evidence else ""
    if found.is_lost_at_once:
        return "the inputs are nearly alike: normalise them"
    if options.only_measures:
        return "LSUV may fix this"
    if options.init == AUTO:
        return "the best that was tried; fewer layers, norms or shortcuts would help"
    return 'try init="auto", which looks for better weights'
