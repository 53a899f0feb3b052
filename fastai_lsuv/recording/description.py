"""What samples show of the tensors from which they were taken: of all at once, in operations that don't wait."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastai_lsuv.recording.layout import CHUNK, Layout

FEATURES = ("mean", "std", "near_zero", "sparsity", "at_limit", "signal")  # see `describe`
# As many bins as in fastai's `ActivationStats` and as wide, but of both signs; the outermost hold what lies beyond.
HIST_BINS, HIST_RANGE = 40, (-5.0, 5.0)
_SPARSE = 0.05  # of the std: nearer to 0 than this is nothing beside the rest
_LIMIT = 0.05  # of the range of sizes: nearer to its upper end than this is at the limit
_SCALES = (1e-30, 1e30)  # divided by numbers between these, the squares of any values are in the range of float32


def describe(
    buffer: Tensor,  # of samples
    layout: Layout,
    near_zero: float = 0.05,  # |x| up to it counts as near zero
    with_hist: bool = False,  # with a histogram, whose counts are scaled up to all values
) -> Tensor:
    """What the samples show: (layers, features), with the columns of `FEATURES`, then those of a histogram.

    `mean` and (unbiased) `std`; `near_zero`, the share of |x| <= near_zero; `sparsity`, the share that is nearly zero
    beside the std, whatever the scale; `at_limit`, the share of sizes near the largest: of a saturated tanh nearly all,
    of a saturated sigmoid half; `signal`, the part of the std that is due to the input: the std over the batch at the
    same place, in the whole std, 0 to 1 (NaN of a single input). Several samples of a layer count as one; NaN for a
    layer that has none.
    """
    values = buffer.view(-1)
    size = _looked_up(values, layout.fewer).abs_()
    low, high = size.amin(1, keepdim=True), size.amax(1, keepdim=True)
    mean, std, centred, squares = _moments(buffer, layout, high)
    at_limit = (size - (high - _LIMIT * (high - low))).ge_(0.0).mean(1) * layout.are_many
    sparsity = (size - _SPARSE * std.nan_to_num(0.0)[:, None]).le_(0.0).mean(1)
    few = values.index_select(0, layout.few)
    near = _of_each(few.abs().le_(near_zero).view(-1, CHUNK).sum(1), layout.few_table) / layout.few_counts
    features = torch.stack([mean, std, near, sparsity, at_limit, _signal(centred, squares, layout)], 1)
    if with_hist:
        features = torch.cat([features, _histogram(few, layout)], 1)
    return _of_layers(features, layout)


def describe_moments(buffer: Tensor, layout: Layout) -> Tensor:
    """Mean and std only: (layers, 2)."""
    high = _looked_up(buffer.view(-1), layout.fewer).abs_().amax(1, keepdim=True)
    return _of_layers(torch.stack(_moments(buffer, layout, high)[:2], 1), layout)


def _looked_up(values: Tensor, places: Tensor) -> Tensor:
    """Look up values by a table of places: several times as fast on the CPU as to index by it."""
    return values.index_select(0, places.view(-1)).view(places.shape)


def _of_each(of_rows: Tensor, table: Tensor) -> Tensor:
    """Sums of rows over each sample's own."""
    return _looked_up(of_rows, table).sum(1)


def _moments(buffer: Tensor, layout: Layout, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and unbiased std of each sample; `high`, (samples, 1), tells the order of size of its values.

    And what they come from, on a scale on which nothing overflows: the values less the mean, and their sums of squares.
    """
    mean = _of_each(buffer.sum(1), layout.row_table) / layout.counts
    scale = _scale(high)
    centred = (buffer - mean[layout.sample_of_row, None]).mul_(scale.reciprocal()[layout.sample_of_row])
    centred.view(-1).index_fill_(0, layout.padding, 0.0)
    squares = _of_each(torch.linalg.vector_norm(centred, dim=1).square_(), layout.row_table)
    std = (squares / (layout.counts - 1)).sqrt_() * scale[:, 0]  # of one value 0 / 0: NaN
    return mean, std, centred, squares


def _scale(high: Tensor) -> Tensor:
    """By what values up to this are divided before they are squared: of tiny and huge ones that is 0 or infinite."""
    return torch.where(high > 0, high, 1.0).clamp(*_SCALES)


def _signal(centred: Tensor, squares: Tensor, layout: Layout) -> Tensor:
    """Std over the batch at the same place in the whole std, by the sums of squares: analysis of variance."""
    sums = centred.new_zeros(layout.groups + 2, CHUNK).index_add_(0, layout.group_of_row, centred)
    between = _of_each(torch.linalg.vector_norm(sums, dim=1).square_(), layout.group_table) / layout.parts
    within = torch.where(squares > 0, (1 - between / squares).clamp_(min=0.0), squares)  # of a constant: 0
    return (within * layout.signal_scale).sqrt_()


def _histogram(few: Tensor, layout: Layout) -> Tensor:
    """Counts of each sample in `HIST_BINS` over `HIST_RANGE`, scaled up to all values.

    By arithmetic alone, for all samples at once: `histc` takes several times as long.
    """
    low, high = HIST_RANGE
    width, samples = HIST_BINS + 1, len(layout.spots)
    place = ((few - low) * (HIST_BINS / (high - low)) + 1).clamp_(1, HIST_BINS)
    place = place.nan_to_num_(0.0).long().view(-1, CHUNK)  # 0: NaN
    bins = place.add_(width * layout.sample_of_few[:, None]).view(-1)
    counts = few.new_zeros(samples * width).scatter_add_(0, bins, few.new_ones(()).expand(len(bins)))
    of_all = layout.sample_sizes / layout.few_counts
    return counts.view(samples, width)[:, 1:] * of_all[:, None]


def _of_layers(samples: Tensor, layout: Layout) -> Tensor:
    """(layers, features) from (samples, features); NaN for a layer without one."""
    if layout.is_one_each:
        return samples
    with_nan = torch.nn.functional.pad(samples, (0, 0, 0, 1), value=math.nan)
    rows = with_nan[layout.layer_table]
    return rows[:, 0] if rows.shape[1] == 1 else _pooled(rows, layout.sizes[:, :, None])


def _pooled(rows: Tensor, sizes: Tensor) -> Tensor:
    """Several samples together: mean and std as over all their values, shares by size, counts added up."""
    there, total = sizes > 0, sizes.sum(1)
    rows = rows.where(there, 0.0)
    pooled = (rows * sizes).sum(1) / total
    scale = _scale(rows[:, :, :2].abs().amax((1, 2), keepdim=True))
    between = (rows[:, :, :1] - pooled[:, None, :1]).div_(scale).square_() * sizes
    within = torch.where(sizes > 1, (rows[:, :, 1:2] / scale).square_() * (sizes - 1), 0.0)
    pooled[:, 1:2] = ((between + within).sum(1) / (total - 1)).sqrt_() * scale[:, 0]
    pooled[:, len(FEATURES) :] = rows[:, :, len(FEATURES) :].sum(1) / (total > 0)
    return pooled
