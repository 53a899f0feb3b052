"""How much of the input is left in an output: what no mean and no std tell.

An output's variance is that over the batch at the same place, which is due to the input, and that between places, which
all inputs share. Where the first is nothing beside the second, all inputs look the same (in mean field theory, their
correlation has come to 1: Schoenholz et al. 2017, arXiv:1611.01232). And where the outputs of all inputs lie on one
line, they differ in size only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Share of the std that is due to the input, below which a network doesn't train well: by experiment (`nbs/study.py`).
SIGNAL_LOST = 0.2

# Values are enough if there are so many, from so many places, in so many samples of the batch.
_VALUES, _PLACES, _SAMPLES = 2**15, 2**10, 2**8
_FEWEST = 3  # samples that need not lie on one line


@dataclass(frozen=True)
class Signal:
    """What is seen of an output, on the device of the data: sums over the calls of a layer."""

    over_batch: Tensor  # variance over the batch at the same place
    of_all: Tensor  # variance of all values
    cosine: Tensor  # mean square cosine of the angle between two samples, seen from the mean of all
    n_calls: int = 1

    def merge(self, other: Signal) -> Signal:
        """Return the same of the calls of both."""
        return Signal(
            self.over_batch + other.over_batch,
            self.of_all + other.of_all,
            self.cosine + other.cosine,
            self.n_calls + other.n_calls,
        )


def signal(x: Tensor, with_angle: bool = True) -> Signal:
    """Look at the same places, evenly spread, of samples of the batch: a few operations, and no wait."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    unknown = torch.full((), math.nan, dtype=wide, device=x.device)
    if not x.dim() or len(x) < 2 or not x.numel():
        return Signal(unknown, unknown, unknown)
    sample = _some_places(x).to(wide)
    variance, mean = torch.var_mean(sample, 0)
    has_angle = with_angle and len(sample) >= _FEWEST and sample.shape[1] > 1
    return Signal(variance.mean(), sample.var(), _mean_square_cosine(sample - mean) if has_angle else unknown)


def shares(over_batch: float, of_all: float, cosine: float) -> tuple[float, float]:
    """Return the share of the std that is due to the input, and the sine of the angle between samples, both 0 to 1.

    NaN where there is none, as of a batch of one.
    """
    signal = min(math.sqrt(over_batch / of_all), 1.0) if 0 < of_all < math.inf else math.nan
    return signal, math.sqrt(max(1.0 - cosine, 0.0))


def _mean_square_cosine(centred: Tensor) -> Tensor:
    """Mean over all pairs of samples, by one product of matrices."""
    n = len(centred)
    directions = centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    squares = torch.linalg.vector_norm(directions @ directions.T).square()
    return (squares - n) / (n * (n - 1))


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
