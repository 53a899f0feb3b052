"""How much of the input is left in an output: what no mean and no std tell.

An output's variance is that over the batch at the same place, which is due to the input, and that between places, which
all inputs share. Where the first is nothing beside the second, all inputs look the same (in mean field theory, their
correlation has come to 1: Schoenholz et al. 2017, arXiv:1611.01232). And where the outputs of all inputs lie on one
line, or a few loud inputs carry all of the variance, the others look the same, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastai_lsuv.core.bulk import alike, sum_dtype

# Share of the std that is due to the input, below which a network doesn't train well: by experiment (`nbs/study.py`).
SIGNAL_LOST = 0.1

# Values are enough if there are so many, from so many places, in so many samples of the batch.
_VALUES, _PLACES, _SAMPLES = 2**15, 2**10, 2**7
_AT_ONCE = 16  # samples that are looked at together: in double precision a megabyte each at most
_FEWEST = 3  # samples that need not lie on one line, seen from their mean


@dataclass(frozen=True, eq=False)
class Signal:
    """What is looked at of one call of a layer: the same places, evenly spread, of samples of the batch."""

    size: torch.Size  # samples and places
    with_spread: bool
    sample: Tensor | None  # on the device of the data: half a megabyte at most, until it's looked at
    numbers: Tensor | None = None  # what has been seen of it

    def looked_at(self) -> Signal:
        """Return what is seen of it alone, without the sample."""
        return replace(self, sample=None, numbers=_look([self]))

    def shares(self, within: float, between: float, gram: float = math.nan) -> tuple[float, float]:
        """Return, from what `looks` sees, the share of the std that is due to the input, and the spread; both 0 to 1.

        The spread is 1 - 1 / the participation ratio of the directions in which samples differ, (Σλ)² / Σλ² of the
        eigenvalues of their covariance: 0 on one line, 1 if each sample has a direction of its own.
        """
        n, places = self.size
        trace = within**2
        over_batch, of_all = trace / (n - 1) / places, (trace + n * places * between) / (n * places - 1)
        if not 0 < of_all < math.inf:
            return math.nan, math.nan
        spread = (1 - min(gram / trace, 1.0) ** 2) * (n - 1) / (n - 2) if gram >= 0 < trace else math.nan
        return min(math.sqrt(over_batch / of_all), 1.0), spread


def signal(x: Tensor, with_spread: bool = True) -> Signal | None:
    """Take a sample of an output: one operation. A batch of one has no signal."""
    if not x.dim() or len(x) < 2 or not x.numel():
        return None
    sample = _some_places(x).clone(memory_format=torch.contiguous_format)
    return Signal(sample.shape, with_spread and len(sample) >= _FEWEST and sample.shape[1] > 1, sample)


def looks(signals: Sequence[Signal]) -> list[tuple[list[int], Tensor]]:
    """Look at samples, those of one shape together: so many operations for some dozens of layers as for one.

    Return which they are, and what is seen of each: the norm of the samples, seen from their mean; the variance of
    their mean between places; and the norm of their Gram matrix.
    """
    done = [([i], s.numbers) for i, s in enumerate(signals) if s.numbers is not None]
    pending = [(i, s.sample) for i, s in enumerate(signals) if s.sample is not None]
    of_shape = [[pending[j][0] for j in which] for which in alike([sample for _, sample in pending])]
    chunks = [which[i : i + _AT_ONCE] for which in of_shape for i in range(0, len(which), _AT_ONCE)]
    return [*done, *((which, _look([signals[i] for i in which])) for which in chunks)]


def _look(signals: Sequence[Signal]) -> Tensor:
    x = torch.stack([s.sample for s in signals if s.sample is not None])
    mean = x.mean(1, keepdim=True, dtype=sum_dtype(x))
    centred = x - mean
    seen = [torch.linalg.vector_norm(centred, dim=(1, 2)), mean.var((1, 2), correction=0)]
    if any(s.with_spread for s in signals):
        seen.append(torch.linalg.vector_norm(centred @ centred.mT, dim=(1, 2)))
    return torch.stack(seen, 1)


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
