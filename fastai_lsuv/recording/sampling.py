"""What a sample of a tensor's values shows of it, at a cost that doesn't grow with the tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastai_lsuv.core.statistics import in_memory_order

# A sample of a large output: mean and std are then within 2 % of the std, for a cost that doesn't grow with the output.
SAMPLE = 2**15  # values, or somewhat more or less
FEW = 2**12  # of these, or so, for the share near zero and a histogram
FEWER = 2**10  # of those, or so, for what only a verdict is made from
HIST_BINS, HIST_RANGE = 40, (0.0, 10.0)  # as in fastai's `ActivationStats`: `histc(40, 0, 10)`
FEATURES = ("mean", "std", "near_zero", "sparsity", "at_limit", "signal")  # see `describe`
_SPARSE = 0.05  # of the std: nearer to 0 than this is nothing beside the rest
_LIMIT = 0.05  # of the range of sizes: nearer to its upper end than this is at the limit
_MANY = 100  # of fewer values some are always near their limit


def sample(x: Tensor, size: int = SAMPLE) -> Tensor:
    """A copy of about `size` values of `x` in fp32, spread evenly over all of it: all values if there are no more.

    Its first dimension is that of the batch, or has two halves of the same places in both halves of the batch, so that
    the samples in it can be compared; it has one, if the size of a large batch is odd.
    """
    x = x.detach()
    if type(x) is not Tensor:
        x = x.as_subclass(Tensor)
    if x.is_nested:
        x = x.values()
    if x.numel() > size:
        halves = 1 if len(x) % 2 else 2
        values = in_memory_order(x).view(halves, -1)
        x = values[:, :: _distance(values.shape[1], x.numel() / size)]
    return x.to(torch.float32, copy=True)


def _distance(n: int, wanted: float) -> int:
    """A distance between sampled values of `n` that has no divisor in common with `n`, hence none with any dimension.

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


def describe(
    samples: Tensor,  # of outputs of one size, as `sample` makes them, side by side: (outputs, …), fp32
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
    rows = samples.reshape(len(samples), -1)
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
    if samples.dim() < 2 or samples.shape[1] % 2:
        return samples.new_full((len(samples),), math.nan)
    first, second = samples.reshape(len(samples), 2, -1)[:, :, :FEW].unbind(1)
    difference = first - second
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
