"""A block with something nonlinear in it, corrected by trying: the block alone is run again, not the model."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fastai_lsuv.core.iterated import Broyden, Dial
from fastai_lsuv.core.layers import Unit
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.statistics import Moments
from fastai_lsuv.learner.distributed import Ranks

# The first step scales alone, by f; the std must follow by f^0.5 at least. One that follows much less (a residual
# branch, a standardised weight) would be scaled for ever, to weights of nothing or without bound: a wrong answer.
_LEAST_EFFECT = 0.5
_NO_EFFECT = 0.05
# What centring may then ask for. A bounded activation (tanh to std 1) would ask for more and more.
_LARGEST_FACTOR = math.log(4.0)


def one_sided(unit: Unit, y: Tensor, seen: Moments, ranks: Ranks) -> bool:
    """Whether an output has one sign only, or nearly (GELU): centring it would switch nearly all of it off."""
    low, high = ranks.extremes(unit.name, y.min(), y.max())
    return min(-float(low), float(high)) < 0.5 * float(seen.std)


def error(seen: Moments, options: Options, centred: bool) -> float:
    """How far the std, and the mean if it is to be `centred`, are from the wanted ones, in the worst channel.

    In units of a wanted std below 1.
    """
    off = 0.0 if options.std is None else float((seen.std - options.std).abs().max())
    if centred and options.mean is not None:
        off = max(off, float((seen.mean - options.mean).abs().max()))
    return off / options.small


def is_right(seen: Moments, options: Options, tol: float, centred: bool) -> bool:
    """Whether mean (if it is to be `centred`) and std are as wanted, in every channel."""
    return error(seen, options, centred) <= tol


def correct_block(unit: Unit, dial: Dial, seen: Moments, run: Callable[[], Moments]) -> bool:
    """Turn the dial until the output that `run` measures is as wanted, or to where it is nearest; is it right then?"""
    options, solver, best, centre = unit.options, Broyden(), (math.inf, dial.position), 0.0
    for tries in range(options.max_iter):
        if is_right(seen, options, options.tol / 2, dial.shifts):
            return True
        target = solver.next(dial.position, dial.image(seen))
        if tries == 0 and options.std is not None:
            target[1:] = 0
            centre = float(target[0])
        target[0] = target[0].clamp(centre - _LARGEST_FACTOR, centre + _LARGEST_FACTOR)
        dial.turn(target)
        before, seen = seen, run()
        if tries == 0 and (effect := _effect(centre, before, seen)) < _LEAST_EFFECT:
            dial.reset()
            if abs(effect) < _NO_EFFECT:
                unit.skip("weight has no effect on scale")
            return False
        unit.n_iter += 1
        best = min(best, (error(seen, options, dial.shifts), dial.position), key=lambda pair: pair[0])
    dial.turn(best[1])
    return best[0] <= options.tol


def _effect(log_factor: float, before: Moments, after: Moments) -> float:
    """Exponent e in std_after = std_before * factor^e; 1 where the factor is too near 1 to tell."""
    if abs(log_factor) < 0.02:
        return 1.0
    ratio = float(after.std / before.std)
    return math.log(ratio) / log_factor if ratio > 0 else 0.0
