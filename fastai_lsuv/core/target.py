"""What is wanted of a layer's output, and how far off it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fastai_lsuv.core.statistics import Measured

EXACT = 1e-3  # |mean - wanted| and |std - wanted| of an affine layer in a clean pass; of a wanted std below 1


@dataclass(frozen=True)
class Target:
    """Wanted mean and standard deviation of an output (of each of its channels); `None` leaves that one alone."""

    mean: float | None
    std: float | None

    @property
    def scale(self) -> float:
        """What deviations are measured in: the wanted std where it is below 1, of which 1e-3 may be all."""
        return min(1.0, self.std or 1.0)

    def error(self, seen: Measured) -> float:
        """Return how far mean and std are off, in the worst channel; NaN if they aren't numbers."""
        pairs = (seen.mean, self.mean), (seen.std, self.std)
        off = [abs(value - wanted) for values, wanted in pairs if wanted is not None for value in values]
        return math.nan if any(map(math.isnan, off)) else max(off, default=0.0) / self.scale

    def without_mean(self) -> Target:
        """Return the same for an output whose mean is kept."""
        return replace(self, mean=None)

    def for_branch(self, n: int) -> Target:
        """Return the same for the end of one of `n` residual branches, whose variances add up to that of one layer.

        As GPT-2 does it (Radford et al. 2019); Hayou et al. 2021 (arXiv:2010.12859) show that 1/√n keeps signal and
        gradients bounded at any depth.
        """
        assert self.std is not None
        return replace(self, std=self.std / math.sqrt(n))
