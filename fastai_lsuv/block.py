"""A block with something nonlinear in it, corrected by trying: the block alone is run again, not the model."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fastai_lsuv.options import Options
from fastai_lsuv.solver import Anderson, Dial
from fastai_lsuv.stats import Moments
from fastai_lsuv.units import Unit

# A scaling by f must scale the std by f or nearly so. One that acts much less (tanh near its bounds, a residual branch,
# a standardised weight) would go on for ever, to weights of nothing or without bound: a wrong answer.
_LEAST_EFFECT = 0.5
_NO_EFFECT = 0.05


def one_sided(y: Tensor, seen: Moments) -> bool:
    """Whether an output has one sign only, or nearly (GELU): centring it would switch nearly all of it off."""
    return min(-float(y.min()), float(y.max())) < 0.5 * float(seen.std)


def is_right(seen: Moments, options: Options, tol: float, centred: bool) -> bool:
    """Whether mean (if it is to be `centred`) and std are as wanted, in every channel."""
    off = 0.0 if options.std is None else float((seen.std - options.std).abs().max())
    if centred and options.mean is not None:
        off = max(off, float((seen.mean - options.mean).abs().max()))
    return off <= tol


def correct_block(unit: Unit, dial: Dial, seen: Moments, run: Callable[[], Moments], options: Options) -> None:
    """Turn the dial until the output that `run` measures is as wanted, or until turning it no longer helps."""
    anderson, tries = Anderson(), 0
    while not is_right(seen, options, options.tol / 2, dial.shifts) and tries < options.max_iter:
        here = dial.position
        target = anderson.next(here, dial.image(seen))
        if tries == 0 and options.std is not None:
            target[1:] = 0  # the scale alone first: does it do what a scale should?
        dial.turn(target)
        now, tries = run(), tries + 1
        effect = _effect(float(target[0] - here[0]), seen, now)
        if effect < _LEAST_EFFECT:
            dial.turn(here) if tries > 1 else dial.reset()
            if tries == 1 and abs(effect) < _NO_EFFECT:
                unit.skip("weight has no effect on scale")
                return
            break
        seen = now
    unit.n_iter += tries


def _effect(log_factor: float, before: Moments, after: Moments) -> float:
    """Exponent e in std_after = std_before * factor^e; 1 where the factor is too near 1 to tell."""
    if abs(log_factor) < 0.1:
        return 1.0
    ratio = float(after.std / before.std)
    return math.log(ratio) / log_factor if ratio > 0 else 0.0
