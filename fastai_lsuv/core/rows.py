"""What the report says of each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.reasons import Skip
from fastai_lsuv.core.statistics import Measured
from fastai_lsuv.core.target import EXACT, Target
from fastai_lsuv.report import Row

_EPS_OF_HALF = 1e-4  # fp16 and bf16 have a larger one
_LARGE = 1e4  # |mean| / std, or std, at which fp32 outputs are rounded to about 1e-3


def row_of(layer: Layer, options: Options) -> Row:
    """Return the report's row of a layer."""
    before, after = _moments(layer.before, layer.target), _moments(layer.after, layer.target)
    unknown = Measured(0, (), ())
    was, is_now = layer.before or unknown, layer.after or unknown
    status = status_of(layer, options)
    kind = type(layer.module).__name__
    n_calls = 0 if layer.skipped is Skip.NEVER_CALLED else layer.n_calls
    return Row(
        layer.name, kind, n_calls, *before, *after, layer.n_iter, status, layer.reason,
        was.signal, is_now.signal, is_now.spread, layer.grad,
    )  # fmt: skip


def status_of(layer: Layer, options: Options) -> str:
    """Return what became of a layer."""
    if layer.skipped:
        return "skipped"
    if options.only_measures:
        return "unchanged"
    if not _is_right(layer, options):
        return "not_converged"
    return "corrected" if layer.n_iter else "unchanged"


def may_get_better(layer: Layer, options: Options) -> bool:
    """Return whether it isn't right, or right only by the allowance for a mean that dwarfed the std."""
    return not _is_right(layer, options) or (layer.ratio > _LARGE and not _is_right(layer, options, exactly=True))


def _is_right(layer: Layer, options: Options, exactly: bool = False) -> bool:
    tol = options.tol if layer.is_block or layer.is_shared else EXACT
    allowed = tol + (0.0 if exactly else _rounding(layer))
    return layer.after is not None and layer.target.error(layer.after) <= allowed


def _rounding(layer: Layer) -> float:
    """What the output's precision allows to be off: a few eps, times |mean| / std where the mean dwarfs the std."""
    if layer.after is None:
        return 0.0
    std = layer.target.std or max(layer.after.std)
    wanted = abs(layer.target.mean or 0.0) / std if std else 0.0
    size = max(1.0, layer.ratio, wanted) * max(1.0, std)
    return 4 * layer.eps * size if layer.eps > _EPS_OF_HALF or size > _LARGE else 0.0


def _moments(seen: Measured | None, target: Target) -> tuple[float, float]:
    """Mean and std, of the channels those farthest from the wanted ones."""
    if seen is None:
        return math.nan, math.nan
    return _farthest(seen.mean, target.mean or 0.0), _farthest(seen.std, target.std or 1.0)


def _farthest(values: Sequence[float], wanted: float) -> float:
    return max(values, key=lambda value: math.inf if math.isnan(value) else abs(value - wanted))
