"""Moments of a tensor: exact, cheap, and mergeable over calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from fastai_lsuv.core.bulk import on_host, sum_dtype
from fastai_lsuv.core.signal import Signal, looks, signal

# `std_mean` costs twenty times as much on the CPU as a sum and a norm over short rows, which the
# vector units do at memory speed. Rows also bound the rounding error: the squares of each are added in the tensor's
# own precision, and the (many, small) row results in float64.
_ROW = 1024

# Up to this many values float64 throughout is the fastest: the number of calls decides, not the memory.
_SMALL = 2**15

# So many values of half precision at a time are copied in single: 64 MB.
_PART = 2**24

# One-pass moments lose about eps * (1 + mean²/var) of the variance; beyond this ratio the centred second pass is due.
_MAX_RATIO = 100.0
# Outside this range the squares of float32 values overflow or underflow; float64 holds them.
_SAFE_SQUARES = (1e-30, 1e30)


@dataclass(frozen=True)
class Moments:
    """Count, mean and unbiased standard deviation of a set of values, or of each channel of it.

    `mean` and `std` are 0-d tensors, or vectors with one entry per channel, on the device of the data; `std` is NaN for
    fewer than two values, as in `Tensor.std`.
    """

    n: int  # number of values (in each channel)
    mean: Tensor
    std: Tensor
    signals: tuple[Signal, ...] = ()  # of its calls, if these were looked at

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together (Chan, Golub & LeVeque 1979, "Updating formulae …")."""
        n = self.n + other.n
        if not self.n or not other.n:
            return self if self.n else other
        delta = other.mean - self.mean
        m2 = self._m2() + other._m2() + delta**2 * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), (m2 / (n - 1)).sqrt(), self.signals + other.signals)

    def on_host(self) -> Measured:
        """Return the same as numbers, which waits for the device."""
        return fetched([self])[0]

    def _m2(self) -> Tensor:
        """Sum of squared deviations from the mean."""
        return self.std.square() * (self.n - 1) if self.n > 1 else torch.zeros_like(self.mean)


@dataclass(frozen=True)
class Measured:
    """Moments as plain numbers: one mean and std, or one of each channel."""

    n: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    signal: float = math.nan  # share of the std that is due to the input
    spread: float = math.nan  # of the outputs of different inputs over directions: 0 if all lie on one line

    @property
    def rms(self) -> float:
        """Root mean square."""
        biased = (self.n - 1) / max(self.n, 1)
        variances = [s * s * biased if self.n > 1 else 0.0 for s in self.std]
        return math.sqrt(fmean(m * m + var for m, var in zip(self.mean, variances, strict=True)))

    @property
    def is_finite(self) -> bool:
        """Whether all are finite."""
        return all(map(math.isfinite, (*self.mean, *self.std)))


def moments(x: Tensor, channel_dim: int | None = None, careful: bool = False) -> Moments:
    """Return the moments of all values of `x`, or of each channel if `channel_dim` is given.

    Nothing is copied to the host on an accelerator, where values are read once, by Welford's method; `careful` reads
    them twice, in double precision, and holds squares that overflow or underflow there (exploded or dying signals).
    """
    x = x.detach() if x.requires_grad else x
    if type(x) is not Tensor:
        x = x.as_subclass(Tensor)
    n_channels = 1 if channel_dim is None else x.shape[channel_dim]
    careful |= x.numel() < 2 * n_channels  # of a single value PyTorch's own say no more than a warning
    is_half = x.dtype.itemsize < torch.float32.itemsize
    if is_half and x.numel() >= _PART and not careful and channel_dim is None and not at_hand(x):
        return _in_parts(in_memory_order(x))
    x = x.float() if is_half else x
    if channel_dim is not None:
        return _by_channel(x, channel_dim, careful or at_hand(x))
    if at_hand(x):
        return _at_hand(in_memory_order(x))
    return _twice(in_memory_order(x)) if careful else _once(x)


def with_signal(x: Tensor, channel_dim: int | None, careful: bool, with_spread: bool) -> Moments:
    """Return the moments of `x`, and how much of it is due to the input."""
    x = x if type(x) is Tensor else x.as_subclass(Tensor)
    seen = signal(x, with_spread)
    if seen is not None and at_hand(x):
        seen = seen.looked_at()  # to wait for others saves nothing
    return replace(moments(x, channel_dim, careful), signals=() if seen is None else (seen,))


def at_hand(x: Tensor) -> bool:
    """Whether a value of it can be read at no cost. To read one from an accelerator is to wait for all it has to do."""
    return x.device.type == "cpu"


def fetched(seen: Sequence[Moments]) -> list[Measured]:
    """Return moments as numbers, in one go."""
    signals = [signal for m in seen for signal in m.signals]
    looked = looks(signals)
    home = on_host([*(x for m in seen for x in (m.mean, m.std)), *(numbers for _, numbers in looked)])
    shares: dict[int, tuple[float, float]] = {}
    for (which, numbers), values in zip(looked, home[2 * len(seen) :], strict=True):
        rows = zip(*[iter(values)] * numbers.shape[1], strict=True)
        shares |= {i: signals[i].shares(*row) for i, row in zip(which, rows, strict=True)}
    in_order = iter(shares[i] for i in range(len(signals)))
    return [
        Measured(m.n, mean, std, *_mean_over_calls([*islice(in_order, len(m.signals))]))
        for m, mean, std in zip(seen, home[::2], home[1::2], strict=False)
    ]


def _mean_over_calls(shares: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Signal and spread of a layer."""
    return (fmean(s for s, _ in shares), fmean(s for _, s in shares)) if shares else (math.nan, math.nan)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which values of a type are computed with."""
    return dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32


def in_memory_order(x: Tensor) -> Tensor:
    """All values in memory order, so that channels-last and transposed tensors are viewed, not copied."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.reshape(-1)


def _at_hand(x: Tensor) -> Moments:
    """One pass, nearly always: a look at the sums tells whether they are good enough."""
    n = x.numel()
    if n <= _SMALL:
        x = x.double()
    total, squares = _sums(x)
    low, high = _SAFE_SQUARES
    if x.dtype == torch.float32 and not n * low < squares < n * high:
        x = x.double()
        total, squares = _sums(x)
    mean = total / max(n, 1)
    m2 = squares - n * mean * mean
    if not n * mean * mean <= _MAX_RATIO * m2:
        centre = x.new_tensor(mean)
        total, squares = _sums(x - centre)
        rest = total / max(n, 1)  # what the rounding of the mean left over
        mean, m2 = float(centre) + rest, max(squares - n * rest * rest, 0.0)
    std = math.sqrt(m2 / (n - 1)) if n > 1 else math.nan
    return Moments(n, x.new_tensor(mean, dtype=torch.float64), x.new_tensor(std, dtype=torch.float64))


def _sums(x: Tensor) -> tuple[float, float]:
    """Sum of the values (PyTorch's is a cascade) and of their squares."""
    if x.dtype != torch.float32:
        return float(x.sum()), float(x.dot(x))
    whole = x.numel() - x.numel() % _ROW
    norms = torch.linalg.vector_norm(x[:whole].view(-1, _ROW), dim=1).double()
    tail = x[whole:].double()
    return float(x.sum()), float(norms.dot(norms)) + float(tail.dot(tail))


def _once(x: Tensor) -> Moments:
    std, mean = torch.std_mean(x)
    return Moments(x.numel(), mean, std)


def _in_parts(x: Tensor) -> Moments:
    """The moments of half precisions, in single: never more than a part of them is copied."""
    n_parts, rest = divmod(x.numel(), _PART)
    parts = x[: n_parts * _PART].view(-1, _PART)
    std, mean = (torch.stack(s) for s in zip(*(torch.std_mean(part.float()) for part in parts), strict=True))
    m2 = std.square().sum() * (_PART - 1) + mean.var(correction=0) * parts.numel()
    whole = Moments(parts.numel(), mean.mean(), _std(m2, parts.numel()))
    return whole.merge(_twice(x[-rest:].float())) if rest else whole


def _twice(x: Tensor) -> Moments:
    """The mean, and then the values less the mean, without waiting for the device."""
    n, dtype = x.numel(), sum_dtype(x)
    mean = x.sum(dtype=dtype) / max(n, 1)
    centred = x - mean.to(x.dtype)
    rest = centred.sum(dtype=dtype) / max(n, 1)  # what the rounding of the mean left over
    squares = torch.linalg.vector_norm(centred, dtype=dtype).square()
    return Moments(n, mean.to(x.dtype).to(mean.dtype) + rest, _std((squares - n * rest**2).clamp(min=0), n))


def _by_channel(x: Tensor, channel_dim: int, careful: bool) -> Moments:
    n = x.numel() // max(x.shape[channel_dim], 1)
    if not careful:
        std, mean = torch.std_mean(x, [d for d in range(x.dim()) if d != channel_dim])
        return Moments(n, mean, std)
    rows = x.movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1).to(sum_dtype(x))
    mean = rows.sum(1) / max(n, 1)
    return Moments(n, mean, _std((rows - mean[:, None]).square().sum(1), n))


def _std(m2: Tensor, n: int) -> Tensor:
    return (m2 / (n - 1)).sqrt() if n > 1 else torch.full_like(m2, math.nan)
