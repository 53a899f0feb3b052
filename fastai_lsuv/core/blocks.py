"""A block with something nonlinear in it, corrected by trying: the block alone is run again, not the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastai_lsuv.core.dry_run import Call, DryRun
from fastai_lsuv.core.iterated import Broyden, ScaleAndShift
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.options import Options
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.core.reasons import Note, Skip
from fastai_lsuv.core.statistics import Measured, moments

# The first step scales alone, by f; the std must follow by f^0.5 at least. One that follows much less (a residual
# branch, a standardised weight) would be scaled for ever, to weights of nothing or without bound: a wrong answer.
_LEAST_EFFECT = 0.5
_MOST_EFFECT = 1.5  # of a weight of its own, in which it would have to be linear
_NO_EFFECT = 0.05
_NO_CHANGE = 0.01  # of the std when the weight is doubled
# What centring may then ask for. A bounded activation (tanh to std 1) would ask for more and more.
_LARGEST_FACTOR = math.log(4.0)


def correct_in_pass(
    block: Layer, y: Tensor, seen: Measured, snapshot: nn.Module, call: Call, dry_run: DryRun, options: Options
) -> Any:
    """Correct a block whose output was `y` by running a snapshot of it; return its output then, None if it is the same.

    Its mean is kept where the output has one sign: from the start, or because it had two signs only while it was small,
    as that of GELU has, which is nearly linear there.
    """
    with dry_run.replay(block.module, snapshot) as run:

        def measure() -> Measured:
            return moments(_first(run(call))).on_host()

        setting = ScaleAndShift(block, dry_run, seen)
        if block.owner is None and _is_idle(block, seen, measure):
            block.skip(Skip.NO_EFFECT)
        setting.reset(snapshot)
        if block.skipped:
            return None
        if _centres(block) and is_one_sided(y, seen):
            block.keep_mean(Note.ONE_SIGN)
            setting = ScaleAndShift(block, dry_run, seen)
        right = correct_block(block, setting, seen, measure, options, snapshot)
        if not right and block.n_iter and _centres(block):
            y = _first(run(call))
            if is_one_sided(y, moments(y).on_host()):
                setting.reset(snapshot)
                block.n_iter = 0
                block.keep_mean(Note.ONE_SIGN)
                correct_block(block, ScaleAndShift(block, dry_run, seen), seen, measure, options, snapshot)
        return run(call) if block.n_iter else None


def _centres(block: Layer) -> bool:
    """Whether the mean is moved, by a parameter that would push outputs through the activation behind it."""
    return block.target.mean is not None and not block.exposed_bias


def is_one_sided(y: Tensor, seen: Measured) -> bool:
    """True if an output has one sign only, or nearly (GELU): centring it would switch nearly all of it off."""
    return min(-float(y.min()), float(y.max())) < 0.5 * seen.std[0]


def correct_block(
    block: Layer,
    setting: ScaleAndShift,
    seen: Measured,
    run: Callable[[], Measured],  # what the block's output is like with scale and shift as they are
    options: Options,
    running: nn.Module | None = None,
) -> bool:
    """Move scale and shift until the output is as wanted, or to where it is nearest; return whether it is right."""
    solver, best, centre = Broyden(), (math.inf, setting.position), 0.0
    for tries in range(options.max_iter):
        if block.target.error(seen) <= options.tol / 2:
            return True
        target = solver.next(setting.position, setting.image(seen))
        if tries == 0 and block.target.std is not None:
            target[1:] = 0
            centre = float(target[0])
        target[0] = target[0].clamp(centre - _LARGEST_FACTOR, centre + _LARGEST_FACTOR)
        setting.move(target, running)
        before, seen = seen, run()
        effect = _effect(centre, before, seen) if tries == 0 else 1.0
        has_own_weight = block.owner is None and block.affine is not None
        if effect < _LEAST_EFFECT or (has_own_weight and effect > _MOST_EFFECT):
            if has_own_weight:
                block.skip(Skip.NOT_AFFINE)
            setting.reset(running)
            if abs(effect) < _NO_EFFECT and _is_idle(block, before, run):
                block.skip(Skip.NO_EFFECT)
            setting.reset(running)
            return False
        block.n_iter += 1
        best = min(best, (block.target.error(seen), setting.position), key=lambda pair: pair[0])
    setting.move(best[1], running)
    return best[0] <= options.tol


def _is_idle(block: Layer, before: Measured, run: Callable[[], Measured]) -> bool:
    """Whether to double the weight, and nothing else, changes nothing."""
    for weight in block.affine.scaled if block.affine else ():
        weight.data.mul_(2)
    return abs(run().std[0] / before.std[0] - 1) < _NO_CHANGE


def _effect(log_factor: float, before: Measured, after: Measured) -> float:
    """Exponent e in std_after = std_before * factor^e; 1 where the factor is too near 1 to tell."""
    if abs(log_factor) < 0.02:
        return 1.0
    ratio = after.std[0] / before.std[0]
    return math.log(ratio) / log_factor if ratio > 0 else 0.0


def _first(output: Any) -> Tensor:
    y = first_tensor(output)
    assert y is not None
    return y
