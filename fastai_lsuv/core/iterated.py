"""Where no single step is exact: scale and shift of a layer, and where to move them next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastai_lsuv.core.affine import get_bias, set_bias
from fastai_lsuv.core.dry_run import DryRun
from fastai_lsuv.core.exact import rescale
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.statistics import Measured


class ScaleAndShift:
    """Scale and shift of a layer, relative to the weights that it had when this was made.

    An affine layer's output y becomes scale * (y + shift). The position is the vector (log scale, shift / first std),
    each one number or one per channel; without the second half where the mean stays. In these coordinates the mean of
    a layer with a homogeneous activation behind it (leaky ReLU) depends, but for a factor, on the second half alone.
    """

    def __init__(self, layer: Layer, dry_run: DryRun, seen: Measured) -> None:
        assert layer.affine is not None
        self.layer, self.dry_run, self.affine = layer, dry_run, layer.affine
        dry_run.keep(layer.weights)
        self.first = [w.detach().clone() for w in layer.weights]
        self.first_bias: Any = get_bias(layer.module) if layer.exposed_bias else None
        self.unit_of_shift = _vector(seen.std)
        self.position = torch.zeros((1 + self.shifts) * len(seen.mean), dtype=torch.float64, device="cpu")

    @property
    def shifts(self) -> bool:
        """Whether the mean is moved, too."""
        return self.layer.target.mean is not None

    def image(self, seen: Measured) -> Tensor:
        """Return the position that would be exact for an affine layer whose output now has these moments."""
        scale, shift = self._scale_and_shift(self.position)
        mean, std = _vector(seen.mean), _vector(seen.std)
        target = self.layer.target
        factor = target.std / std if target.std else torch.ones_like(std)
        log_scale = (scale * factor).log()
        if not self.shifts:
            return log_scale
        return torch.cat([log_scale, (shift + ((target.mean or 0.0) / factor - mean) / scale) / self.unit_of_shift])

    def move(self, position: Tensor, running: nn.Module | None = None) -> None:
        """Set scale and shift; of a block that is `running` now, its exposed bias there, too."""
        self.position = position
        scale, shift = self._scale_and_shift(position)
        shift = scale * shift
        if len(scale) == 1:
            scale, shift = scale[0], shift[0]
        exposed = self.layer.exposed_bias
        rescale(self.affine, scale, torch.zeros_like(shift) if exposed else shift, self.first)
        if exposed:
            self._set_bias(self.first_bias + float(shift), running)

    def reset(self, running: nn.Module | None = None) -> None:
        """Go back to the weights that the layer had when this was made, to the bit."""
        self.position = torch.zeros((1 + self.shifts) * self.unit_of_shift.numel(), dtype=torch.float64, device="cpu")
        for w, value in zip(self.layer.weights, self.first, strict=True):
            w.data.copy_(value)
        if self.layer.exposed_bias:
            self._set_bias(self.first_bias, running)

    def _set_bias(self, value: Any, running: nn.Module | None) -> None:
        self.dry_run.biases[self.layer.module] = value
        if running is not None:
            set_bias(running, value)

    def _scale_and_shift(self, position: Tensor) -> tuple[Tensor, Tensor]:
        if not self.shifts:
            return position.exp(), torch.zeros_like(position)
        log_scale, shift = position.chunk(2)
        return log_scale.exp(), shift * self.unit_of_shift


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


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
