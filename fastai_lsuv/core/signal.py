"""How much of the input is left in an output: what no mean and no std tell.

An output's variance is that over the batch at the same place, which is due to the input, and that between places, which
every input shares. Where the first is nothing beside the second, all inputs look the same (Schoenholz et al. 2017,
arXiv:1611.01232: in mean field theory, their correlation has come to 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGNAL_LOST = 0.1  # share of the std that is due to the input, below which a network stays at chance

# Values are enough if there are so many, from so many places, in so many samples of the batch.
_VALUES, _PLACES, _SAMPLES = 2**15, 2**10, 2**8


@dataclass(frozen=True)
class Signal:
    """Variances of an output on the device of the data: over the batch at the same place, and of all values."""

    over_batch: Tensor
    of_all: Tensor

    def merge(self, other: Signal) -> Signal:
        """Return the same of two calls of a layer."""
        return Signal(self.over_batch + other.over_batch, self.of_all + other.of_all)


def signal(x: Tensor) -> Signal:
    """Look at the same places, evenly spread, of all outputs of the batch: a few operations, and no wait."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    if not x.dim() or len(x) < 2 or not x.numel():
        unknown = torch.full((), math.nan, dtype=wide, device=x.device)
        return Signal(unknown, unknown)
    sample = _some_places(x).to(wide)
    return Signal(sample.var(0).mean(), sample.var())


def signal_share(over_batch: float, of_all: float) -> float:
    """Return the share of the std that is due to the input, 0 to 1; NaN where there is none, as of a batch of one."""
    return min(math.sqrt(over_batch / of_all), 1.0) if 0 < of_all < math.inf else math.nan


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
