"""Moments of a tensor: exact, cheap, and mergeable over calls; and what a sample of its values tells at a glance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# `std_mean` costs twenty times as much on the CPU as a sum and a norm over short rows, which the
# vector units do at memory speed. Rows also bound the rounding error: each is summed in the tensor's own
# precision, and the (many, small) row results are added in float64.
_ROW = 1024

# Up to this many values float64 throughout is the fastest: the number of calls decides, not the memory.
_SMALL = 2**15

# One-pass moments lose about eps * (1 + mean²/var) of the variance; beyond this ratio the centred second pass is due.
_MAX_RATIO = 100.0
# Outside this range the squares of float32 values overflow or underflow; float64 holds them.
_SAFE_SQUARES = (1e-30, 1e30)


# A sample of a large output: mean and std are then within 2 % of the std, for a cost that doesn't grow with the output.
SAMPLE = 2**15  # values, or somewhat more or less
FEW = 2**12  # of these, or so, for the share near zero and a histogram
FEWER = 2**10  # of those, or so, for what only a verdict is made from
HIST_BINS, HIST_RANGE = 40, (0.0, 10.0)  # as in fastai's `ActivationStats`: `histc(40, 0, 10)`
FEATURES = ("mean", "std", "near_zero", "sparsity", "at_limit", "signal")  # see `describe`
_SPARSE = 0.05  # of the std: nearer to 0 than this is nothing beside the rest
_LIMIT = 0.05  # of the range of sizes: nearer to its upper end than this is at the limit
_MANY = 100  # of fewer values some are always near their limit


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a set of values, or of each channel of it.

    `mean` and `m2` are 0-d tensors, or vectors with one entry a channel, in float64 on the device of the data.
    """

    n: int  # number of values (in each channel)
    mean: Tensor  # their mean
    m2: Tensor  # sum of their squared deviations from the mean

    @property
    def var(self) -> Tensor:
        """Unbiased variance (NaN for fewer than two values), as in `Tensor.var`."""
        return self.m2 / (self.n - 1) if self.n > 1 else torch.full_like(self.m2, float("nan"))

    @property
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
    x = x.detach().as_subclass(Tensor)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return _pooled_moments(_flat(x)) if channel_dim is None else _channel_moments(x, channel_dim)


def _flat(x: Tensor) -> Tensor:
    """All values in memory order, so that channels-last and transposed tensors are viewed, not copied."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)


def _pooled_moments(x: Tensor) -> Moments:
    n = x.numel()
    if n <= _SMALL and x.device.type == "cpu" and x.dtype != torch.float64:
        x = x.double()
    mean = _sum(x) / max(n, 1)
    if x.dtype != torch.float64 and x.device.type == "cpu":  # a look at the value is free; one pass nearly always does
        m2 = _sum_of_squares(x) - n * mean**2
        low, high = (n * bound for bound in _SAFE_SQUARES)
        if not low < m2 + n * mean**2 < high:
            return _pooled_moments(x.double())
        if n * mean**2 <= _MAX_RATIO * m2:
            return Moments(n, mean, m2)
    centred = x - mean.to(x.dtype)
    rest = _sum(centred) / max(n, 1)  # what the rounding of the mean left over
    return Moments(n, mean.to(x.dtype).to(mean.dtype) + rest, (_sum_of_squares(centred) - n * rest**2).clamp(min=0))


def _channel_moments(x: Tensor, channel_dim: int) -> Moments:
    channels = x.shape[channel_dim]
    rows = x.movedim(channel_dim, 0).reshape(channels, -1).to(_accumulator(x))
    n = rows.shape[1]
    mean = rows.sum(1) / max(n, 1)
    return Moments(n, mean, (rows - mean[:, None]).square().sum(1))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64


def _sum(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return x.sum(dtype=_accumulator(x))
    rows, tail = _rows(x)
    return rows.sum(1).sum(dtype=torch.float64) + tail.sum(dtype=torch.float64)


def _sum_of_squares(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return torch.linalg.vector_norm(x, dtype=_accumulator(x)).square()
    rows, tail = _rows(x)
    norms = torch.linalg.vector_norm(rows, dim=1).double().square().sum()
    return norms + torch.linalg.vector_norm(tail, dtype=torch.float64).square()


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    whole = x.numel() - x.numel() % _ROW
    return x[:whole].view(-1, _ROW), x[whole:]


def sample(x: Tensor, size: int = SAMPLE) -> Tensor:
    """A copy of about `size` values of `x` in fp32, spread evenly over all of it: all values if there are no more.

    In two rows of the same places in both halves of the batch, so that the samples in it can be compared; in one row
    if its size is odd.
    """
    x = x.detach()
    if type(x) is not Tensor:
        x = x.as_subclass(Tensor)
    if x.is_nested:
        x = x.values()
    rows = 1 if not x.dim() or len(x) % 2 else 2
    values = (x if x.is_contiguous() else _flat(x)).view(rows, -1)
    distance = _distance(values.shape[1], x.numel() / size)
    return (values if distance == 1 else values[:, ::distance]).to(torch.float32, copy=True)


def _distance(n: int, wanted: float) -> int:
    """A distance between sampled values of `n` that has no divisor in common with `n`, hence none with any dimension.

    A power of two would see the border columns of a map, or some of the channels, and no others. It is the next that is
    not below `wanted`; or the next below, if that would leave less than two thirds of the values.
    """
    above = below = max(math.ceil(wanted), 1)
    while math.gcd(above, n) > 1:
        above += 1
    if above <= 1.5 * max(wanted, 1):
        return above
    while math.gcd(below, n) > 1:
        below -= 1
    return below if wanted <= 4 * below else above


def describe(
    samples: Tensor,  # of outputs of one size, as `sample` makes them: (outputs, 1 or 2, values), fp32
    n: int,  # number of values of each output
    near_zero: float = 0.05,  # |x| up to it counts as near zero
    with_hist: bool = False,  # with a histogram, whose counts are scaled up to all `n` values
) -> Tensor:
    """What each sample shows: (outputs, features), with the columns of `FEATURES`, then those of a histogram.

    `mean` and (unbiased) `std`; `near_zero`, the share of |x| <= near_zero; `sparsity`, the share that is nearly zero
    beside the std, whatever the scale; `at_limit`, the share of sizes near the largest: of a saturated tanh nearly all,
    of a saturated sigmoid half; `signal`, the part of the std that differs from one half of the batch to the other, 0
    to about 1 (NaN of an odd batch). Nothing waits for the device.
    """
    rows = samples.flatten(1)
    values = rows.shape[1]
    few = rows[:, :: _distance(n, values / FEW)]
    size = few.abs()
    near = _share(size <= near_zero)
    size = size[:, :: _distance(n, size.shape[1] / FEWER)]
    low, high = size.aminmax(dim=1, keepdim=True)
    mean = rows.mean(1)
    scale = torch.where((high > 0) & high.isfinite(), high, 1.0)  # squares of tiny and huge values are no float32
    norm = torch.linalg.vector_norm((rows - mean[:, None]).div_(scale), dim=1) * scale[:, 0]
    std = norm / math.sqrt(values - 1) if values > 1 else norm * math.nan
    at_limit = _share(size >= high - _LIMIT * (high - low)) if values >= _MANY else torch.zeros_like(mean)
    sparsity = _share(size <= _SPARSE * std.nan_to_num(0.0)[:, None])
    features = torch.stack([mean, std, near, sparsity, at_limit, _signal(samples) / std], 1)
    return torch.cat([features, _histogram(few, n)], 1) if with_hist else features


def _share(true: Tensor) -> Tensor:
    return true.sum(1) / true.shape[1]


def _signal(samples: Tensor) -> Tensor:
    """How far the halves of the batch differ in the same places, as a std."""
    if samples.shape[1] == 1:
        return samples.new_full((len(samples),), math.nan)
    difference = samples[:, 0, :FEW] - samples[:, 1, :FEW]
    return torch.linalg.vector_norm(difference, dim=1) / math.sqrt(2 * difference.shape[1])


def _histogram(rows: Tensor, n: int) -> Tensor:
    """`rows[i].histc(HIST_BINS, *HIST_RANGE)` for every row, scaled up to `n` values; the end of the range is outside.

    By arithmetic alone, for all rows at once: `histc` takes several times as long.
    """
    low, high = HIST_RANGE
    width = HIST_BINS + 2
    place = ((rows - low) * (HIST_BINS / (high - low)) + 1).clamp_(0, width - 1)  # 0: below, width - 1: above
    place = place.long().clamp_(min=0)  # NaN, as a whole number, is far below
    bins = place.add_(width * torch.arange(len(rows), device=rows.device)[:, None]).view(-1)
    counts = rows.new_zeros(len(rows) * width).scatter_add_(0, bins, rows.new_ones(()).expand(len(bins)))
    return counts.view(-1, width)[:, 1:-1] * (n / rows.shape[1])
