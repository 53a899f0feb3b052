"""How a unit is scaled and shifted: in one step, or, where none is exact, by a dial and where to turn it next."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastai_lsuv.core.dry_run import Rehearsal
from fastai_lsuv.core.layers import Unit
from fastai_lsuv.core.statistics import Moments


def correct(unit: Unit, scale: Tensor, shift: Tensor, values: list[Tensor] | None = None) -> None:
    """Make the output `scale` times what it is (or was, with weights of these `values`), plus `shift`."""
    carriers = unit.carriers
    assert carriers is not None
    weight, *bias = values or carriers.parameters
    scale, shift = scale.to(weight.device), shift.to(weight.device) / carriers.gain
    with torch.no_grad():
        factor = carriers.per_channel(scale) if carriers.per_channel and scale.dim() else scale
        _assign(carriers.weight, weight, factor)
        if carriers.bias is not None:
            shape = bias[0].shape if scale.dim() else ()
            _assign(carriers.bias, bias[0], scale.reshape(shape), shift.reshape(shape))


def _assign(parameter: Tensor, value: Tensor, factor: Tensor, offset: Tensor | None = None) -> None:
    """Set a parameter to value * factor + offset, rounded to a half precision only once."""
    wide = torch.promote_types(value.dtype, torch.float32)
    if offset is None and parameter.dtype == wide:  # large weights need no second copy
        torch.mul(value, factor.to(wide), out=parameter)
    else:
        result = value.to(wide) * factor.to(wide)
        parameter.copy_(result if offset is None else result + offset.to(wide))


class Dial:
    """Scale and shift of a unit, relative to the weights that it had when the dial was made.

    An affine unit's output y becomes scale * (y + shift). The position is the vector (log scale, shift / first std),
    each one number or one a channel; without the second half where the mean stays. In these coordinates the mean of
    a unit with a homogeneous activation behind it (leaky ReLU) depends, but for a factor, on the second half alone.
    """

    def __init__(self, unit: Unit, rehearsal: Rehearsal, shifts: bool, seen: Moments) -> None:
        assert unit.carriers is not None
        self.unit, self.options, self.adopt = unit, unit.options, rehearsal.adopt
        undo = rehearsal.undo
        self.shifts = shifts and self.options.mean is not None
        self.parameters = unit.carriers.parameters
        for p in self.parameters:
            undo.remember(p)
        self.first = [p.detach().clone() for p in self.parameters]
        self.first_shift: Any = undo.remember_value(unit, unit.shift.value, unit.shift.set) if unit.shift else None
        self.unit_of_shift = _vector(seen.std)
        self.position = torch.zeros((1 + self.shifts) * seen.mean.numel(), dtype=torch.float64, device="cpu")

    def image(self, seen: Moments) -> Tensor:
        """The position that would be exact for an affine unit whose output now has these moments."""
        scale, shift = self._scale_and_shift(self.position)
        mean, std = _vector(seen.mean), _vector(seen.std)
        factor = self.options.std / std if self.options.std else torch.ones_like(std)
        log_scale = (scale * factor).log()
        if not self.shifts:
            return log_scale
        wanted_mean = self.options.mean or 0.0
        return torch.cat([log_scale, (shift + (wanted_mean / factor - mean) / scale) / self.unit_of_shift])

    def turn(self, position: Tensor) -> None:
        """Set scale and shift."""
        self.position = position
        scale, shift = self._scale_and_shift(position)
        shift = scale * shift
        if len(scale) == 1:
            scale, shift = scale[0], shift[0]
        exposed = self.unit.shift
        correct(self.unit, scale, torch.zeros_like(shift) if exposed else shift, self.first)
        if exposed:
            self.adopt(partial(exposed.set, self.first_shift + float(shift)))

    def reset(self) -> None:
        """Back to the weights that the unit had when the dial was made, to the bit."""
        self.position = torch.zeros_like(self.position)
        with torch.no_grad():
            for p, value in zip(self.parameters, self.first, strict=True):
                p.copy_(value)
        if self.unit.shift:
            self.adopt(partial(self.unit.shift.set, self.first_shift))

    def _scale_and_shift(self, position: Tensor) -> tuple[Tensor, Tensor]:
        if not self.shifts:
            return position.exp(), torch.zeros_like(position)
        log_scale, shift = position.chunk(2)
        return log_scale.exp(), shift * self.unit_of_shift


def _vector(x: Tensor) -> Tensor:
    return x.cpu().double().reshape(-1)


class Broyden:
    """Broyden's method for a fixed point x = g(x) of which one step is nearly exact (Math. Comp. 1965, method 1).

    The approximate inverse Jacobian of x - g(x) is kept as the identity and a sum of outer products, one a step. For
    one unknown it is the secant method; for several it learns from past steps how they act on each other.
    """

    def __init__(self) -> None:
        self.products: list[tuple[Tensor, Tensor]] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def next(self, x: Tensor, g: Tensor) -> Tensor:
        """The point to try after `x`, whose image is `g` (float64 vectors on the CPU)."""
        if self.last is not None:
            moved, change = x - self.last[0], self.last[1] - (g - x)
            expected = self._applied(change)
            if (length := moved @ expected).abs() > 1e-12:
                transposed = moved + sum((right * (left @ moved) for left, right in self.products), start=0.0)
                self.products.append(((moved - expected) / length, transposed))
        self.last = (x, g - x)
        step = self._applied(g - x)
        longest = 3 * (g - x).abs().max()  # a few steps alike say nothing of other directions: don't leap
        return x + step * (longest / step.abs().max().clamp(min=1e-300)).clamp(max=1.0)

    def _applied(self, v: Tensor) -> Tensor:
        return v + sum((left * (right @ v) for left, right in self.products), start=0.0)
