"""How a unit is scaled and shifted: in one step, or, where none is exact, by a dial and where to turn it next."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from fastai_lsuv.options import Options
from fastai_lsuv.rehearsal import Undo
from fastai_lsuv.stats import Moments
from fastai_lsuv.units import Unit


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

    An affine unit's output becomes `scale` times what it was, plus `shift`. The position is the vector (log scale,
    shift / wanted std), each one number or one a channel; without the second half where the mean stays.
    """

    def __init__(self, unit: Unit, options: Options, undo: Undo, shifts: bool, channels: int = 1) -> None:
        assert unit.carriers is not None
        self.unit, self.options = unit, options
        self.shifts = shifts and options.mean is not None
        self.parameters = unit.carriers.parameters
        for p in self.parameters:
            undo.remember(p)
        self.first = [p.detach().clone() for p in self.parameters]
        self.first_shift: Any = undo.remember_value(unit, unit.shift.value, unit.shift.set) if unit.shift else None
        self.position = torch.zeros((1 + self.shifts) * channels, dtype=torch.float64)

    def image(self, seen: Moments) -> Tensor:
        """The position that would be exact for an affine unit whose output now has these moments."""
        mean, std = seen.mean.cpu().double().reshape(-1), seen.std.cpu().double().reshape(-1)
        scale, shift = self._scale_and_shift(self.position)
        factor = self.options.std / std if self.options.std else torch.ones_like(std)
        log_scale = (scale * factor).log()
        if not self.shifts:
            return log_scale
        wanted_mean = self.options.mean or 0.0
        return torch.cat([log_scale, (shift * factor + wanted_mean - factor * mean) / (self.options.std or 1.0)])

    def turn(self, position: Tensor) -> None:
        """Set scale and shift."""
        self.position = position
        scale, shift = self._scale_and_shift(position)
        if len(scale) == 1:
            scale, shift = scale[0], shift[0]
        exposed = self.unit.shift
        correct(self.unit, scale, torch.zeros_like(shift) if exposed else shift, self.first)
        if exposed:
            exposed.set(self.first_shift + float(shift))

    def reset(self) -> None:
        """Back to the weights that the unit had when the dial was made, to the bit."""
        self.position = torch.zeros_like(self.position)
        with torch.no_grad():
            for p, value in zip(self.parameters, self.first, strict=True):
                p.copy_(value)
        if self.unit.shift:
            self.unit.shift.set(self.first_shift)

    def _scale_and_shift(self, position: Tensor) -> tuple[Tensor, Tensor]:
        if not self.shifts:
            return position.exp(), torch.zeros_like(position)
        log_scale, shift = position.chunk(2)
        return log_scale.exp(), shift * (self.options.std or 1.0)


class Anderson:
    """Anderson's acceleration of a fixed-point iteration x = g(x) (J. ACM 1965; Walker & Ni 2011, eq. 2.2).

    For one unknown it is the secant method; for several it learns from past steps how they act on each other.
    """

    def __init__(self, memory: int = 5) -> None:
        self.xs: deque[Tensor] = deque(maxlen=memory + 1)
        self.gs: deque[Tensor] = deque(maxlen=memory + 1)

    def next(self, x: Tensor, g: Tensor) -> Tensor:
        """The point to try after `x`, whose image is `g` (float64 vectors on the CPU)."""
        self.xs.append(x)
        self.gs.append(g)
        if len(self.xs) == 1:
            return g
        gs = torch.stack([*self.gs])
        residuals = gs - torch.stack([*self.xs])
        weights = torch.linalg.lstsq(residuals.diff(dim=0).T, residuals[-1], driver="gelsd").solution
        return g - weights @ gs.diff(dim=0)
