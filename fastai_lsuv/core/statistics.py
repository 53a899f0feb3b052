"""Moments of a tensor: exact, cheap, and mergeable over calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# `std_mean` costs twenty times as much on the CPU as a sum and a norm over short rows, which the
# vector units do at memory speed. Rows also bound the rounding error: the squares of each are added in the tensor's
# own precision, and the (many, small) row results in float64.
_ROW = 1024

# Up to this many values float64 throughout is the fastest: the number of calls decides, not the memory.
_SMALL = 2**15

# One-pass moments lose about eps * (1 + mean²/var) of the variance; beyond this ratio the centred second pass is due.
_MAX_RATIO = 100.0
# Outside this range the squares of float32 values overflow or underflow; float64 holds them.
_SAFE_SQUARES = (1e-30, 1e30)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a set of values, or of each channel of it.

    `mean` and `m2` are 0-d tensors, or vectors with one entry a channel, in float64 on the device of the data.
    """

    n: int  # number of values (in each channel)
    mean: Tensor  # their mean
    m2: Tensor  # sum of their squared deviations from the mean

    @cached_property
    def var(self) -> Tensor:
        """Unbiased variance (NaN for fewer than two values), as in `Tensor.var`."""
        return self.m2 / (self.n - 1) if self.n > 1 else torch.full_like(self.m2, float("nan"))

    @cached_property
    def std(self) -> Tensor:
        """Unbiased standard deviation (NaN for fewer than two values), as in `Tensor.std`."""
        return self.var.sqrt()

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub & LeVeque 1979, "Updating formulae ... sample variances")."""
        n = self.n + other.n
        if n == 0:
            return self
        delta = other.mean - self.mean
        return Moments(n, self.mean + delta * (other.n / n), self.m2 + other.m2 + delta**2 * (self.n * other.n / n))


def moments(x: Tensor, channel_dim: int | None = None) -> Moments:
    """Moments of all values of `x`, or of each channel if `channel_dim` is given.

    Nothing is copied to the host on an accelerator. Accurate in every floating dtype, also where squares would
    overflow or underflow (fp16, exploded or dying signals) and where |mean| dwarfs the std.
    """
    x = x.detach()
    if type(x) is not Tensor:
        x = x.as_subclass(Tensor)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if channel_dim is not None:
        return _channel_moments(x, channel_dim)
    x = in_memory_order(x)
    return _pooled_at_hand(x) if at_hand(x) else _pooled(x)


def at_hand(x: Tensor) -> bool:
    """Whether a value of it can be read at no cost. To read one from an accelerator is to wait for all it has to do."""
    return x.device.type == "cpu"


def fetched(seen: Sequence[Moments]) -> list[Moments]:
    """The same on the CPU: one copy from each device for all of them."""
    home: dict[int, Moments] = {}
    for device in {m.mean.device for m in seen}:
        there = [(i, m) for i, m in enumerate(seen) if m.mean.device == device]
        numbers = torch.cat([torch.stack([m.mean, m.m2]).flatten() for _, m in there]).cpu()
        for (i, m), part in zip(there, numbers.split([2 * m.mean.numel() for _, m in there]), strict=True):
            home[i] = Moments(m.n, *part.view(2, *m.mean.shape).unbind())
    return [home[i] for i in range(len(seen))]


def in_memory_order(x: Tensor) -> Tensor:
    """All values in memory order, so that channels-last and transposed tensors are viewed, not copied."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.reshape(-1)


def _pooled_at_hand(x: Tensor) -> Moments:
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
    return Moments(n, x.new_tensor(mean, dtype=torch.float64), x.new_tensor(m2, dtype=torch.float64))


def _sums(x: Tensor) -> tuple[float, float]:
    """Sum of the values (PyTorch's is a cascade) and of their squares."""
    if x.dtype != torch.float32:
        return float(x.sum()), float(x.dot(x))
    whole = x.numel() - x.numel() % _ROW
    norms = torch.linalg.vector_norm(x[:whole].view(-1, _ROW), dim=1).double()
    tail = x[whole:].double()
    return float(x.sum()), float(norms.dot(norms)) + float(tail.dot(tail))


def _pooled(x: Tensor) -> Moments:
    """Two passes, without waiting for the device: the mean, and the values less the mean."""
    n, accumulator = x.numel(), _accumulator(x)
    mean = x.sum(dtype=accumulator) / max(n, 1)
    centred = x - mean.to(x.dtype)
    rest = centred.sum(dtype=accumulator) / max(n, 1)  # what the rounding of the mean left over
    squares = torch.linalg.vector_norm(centred, dtype=accumulator).square()
    return Moments(n, mean.to(x.dtype).to(mean.dtype) + rest, (squares - n * rest**2).clamp(min=0))


def _channel_moments(x: Tensor, channel_dim: int) -> Moments:
    channels = x.shape[channel_dim]
    rows = x.movedim(channel_dim, 0).reshape(channels, -1).to(_accumulator(x))
    n = rows.shape[1]
    mean = rows.sum(1) / max(n, 1)
    return Moments(n, mean, (rows - mean[:, None]).square().sum(1))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
