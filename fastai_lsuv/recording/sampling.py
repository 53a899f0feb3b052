"""Which values of a tensor are looked at: so many that its mean and std are known, and no more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from fastai_lsuv.core.signal import distance

# A sample of a large output: mean and std are then within 2% of the std, for a cost that doesn't grow with the output.
SAMPLE = 2**15  # values, or somewhat more or less
FEW = 2**12  # of these, or so, for the share near zero and a histogram
FEWER = 2**10  # of those, or so, for what only a verdict is made from


MOST_ROWS = 128  # parts of a batch that are compared
ROWS = 8  # or so, of a large output: with more of them there would be too few places in each


@dataclass(frozen=True)
class Spots:
    """Where the values of a tensor of one shape and layout lie that are looked at, evenly spread over its memory.

    In rows, each of an equal part of the batch and all with the same places in it, so that inputs can be compared: of
    a small tensor an input is a row, if there are not too many.
    """

    size: tuple[int, int]  # (rows, values of each)
    stride: tuple[int, int]
    n: int  # of all values
    is_dense: bool  # the tensor's memory holds its values and no others

    @classmethod
    def of(cls, x: Tensor, wanted: int = SAMPLE) -> Spots:
        """Choose about `wanted` values; all of them if there are no more."""
        n, by_stride = x.numel(), sorted(range(x.dim()), key=x.stride, reverse=True)
        is_dense = x.permute(by_stride).is_contiguous()
        batch_is_outermost = not is_dense or not by_stride or by_stride[0] == 0 or x.stride(0) == x.stride(by_stride[0])
        rows = _rows(len(x), is_large=n > wanted) if x.dim() and batch_is_outermost else 1
        of_row = n // rows
        apart = distance(of_row, n / wanted) if n > wanted else 1
        return cls((rows, math.ceil(of_row / apart)), (of_row, apart), n, is_dense)

    @property
    def values(self) -> int:
        """How many are looked at."""
        return self.size[0] * self.size[1]

    def view(self, x: Tensor) -> Tensor:
        """Look at them, in rows, without a copy where the memory is dense."""
        return (x if self.is_dense else x.contiguous()).as_strided(self.size, self.stride)


@cache
def _rows(n: int, is_large: bool) -> int:
    """Return the divisor of a batch size, up to `MOST_ROWS`, that is nearest to the number of rows that is best."""
    best = ROWS if is_large and n > 2 * ROWS else n
    divisors = (d for d in range(1, min(n, MOST_ROWS) + 1) if n % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / best)), default=1)


def plain_values(x: Tensor) -> Tensor:
    """Return the values of a tensor of any kind, in one that has them in memory (nested ones all in a row)."""
    return x.values() if x.is_nested else x
