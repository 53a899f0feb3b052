"""How much of the input is left in an output: what no mean and no std tell.

An output's variance is that over the batch at the same place, which is due to the input, and that between places, which
all inputs share. Where the first is nothing beside the second, all inputs look the same (in mean field theory, their
correlation has come to 1: Schoenholz et al. 2017, arXiv:1611.01232). And where the outputs of all inputs lie on one
line, or a few loud inputs carry all of the variance, the others look the same, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Share of the std that is due to the input, below which a network doesn't train well: by experiment (`nbs/study.py`).
SIGNAL_LOST = 0.1

# Values are enough if there are so many, from so many places, in so many samples of the batch.
_VALUES, _PLACES, _SAMPLES = 2**15, 2**10, 2**8
_FEWEST = 3  # samples that need not lie on one line, seen from their mean


@dataclass(frozen=True)
class Signal:
    """What is seen of an output, on the device of the data: sums over the calls of a layer."""

    over_batch: Tensor  # variance over the batch at the same place
    of_all: Tensor  # variance of all values
    spread: Tensor  # of the samples around their mean over directions: 0 if they lie on one line
    n_calls: int = 1

    def merge(self, other: Signal) -> Signal:
        """Return the same of the calls of both."""
        return Signal(
            self.over_batch + other.over_batch,
            self.of_all + other.of_all,
            self.spread + other.spread,
            self.n_calls + other.n_calls,
        )


def signal(x: Tensor, with_spread: bool = True) -> Signal:
    """Look at the same places, evenly spread, of samples of the batch: a few operations, and no wait."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    unknown = torch.full((), math.nan, dtype=wide, device=x.device)
    if not x.dim() or len(x) < 2 or not x.numel():
        return Signal(unknown, unknown, unknown)
    sample = _some_places(x).to(wide)
    variance, mean = torch.var_mean(sample, 0)
    has_spread = with_spread and len(sample) >= _FEWEST and sample.shape[1] > 1
    return Signal(variance.mean(), sample.var(), _spread(sample - mean) if has_spread else unknown)


def share(over_batch: float, of_all: float) -> float:
    """Return the share of the std that is due to the input, 0 to 1; NaN where there is none, as of a batch of one."""
    return min(math.sqrt(over_batch / of_all), 1.0) if 0 < of_all < math.inf else math.nan


def _spread(centred: Tensor) -> Tensor:
    """1 - 1 / the participation ratio of the directions in which samples differ, by one product of matrices.

    The ratio, (Σλ)² / Σλ² of the eigenvalues of the covariance, counts directions, each by its variance. Samples that
    are all in directions of their own have 1, however few they are.
    """
    n = len(centred)
    gram = centred @ centred.T
    return (1 - torch.linalg.vector_norm(gram).square() / gram.trace().square()) * ((n - 1) / (n - 2))


def _some_places(x: Tensor) -> Tensor:
    """(samples, places): a view, but of a layout in which the values of a sample don't lie together a copy."""
    if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        x = x.contiguous()
    n, of_sample = len(x), x.stride(0)
    every = -(-n // _SAMPLES)
    samples = -(-n // every)
    apart = distance(of_sample, of_sample / max(_VALUES // samples, _PLACES))
    return x.as_strided((samples, -(-of_sample // apart)), (every * of_sample, apart))


def distance(n: int, wanted: float) -> int:
    """Return a distance between sampled values of `n` that has no divisor in common with `n`, nor with any dimension.

    A power of two would see the border columns of a map, or some of the channels, and no others. It is the next that is
    not below `wanted`; or the next below, if that would leave less than two thirds of the values and this not too many.
    """
    above = below = max(math.ceil(wanted), 1)
    while math.gcd(above, n) > 1:
        above += 1
    if above <= 1.5 * max(wanted, 1):
        return above
    while math.gcd(below, n) > 1:
        below -= 1
    return below if wanted <= 4 * below else above
