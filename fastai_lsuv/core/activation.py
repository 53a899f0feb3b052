"""Which activations come between the layers, as functions: found by what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastai_lsuv.core.dry_run import Call, DryRun
from fastai_lsuv.core.gradient import first_samples
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.core.signal import distance

_VALUES = 2**12  # of an output are looked at
_POINTS = 2**8  # of the function are kept
_SMOOTH = 0.01  # share of the variance that may be between neighbours, if one value is a function of the other


@dataclass(frozen=True, eq=False)
class Activation:
    """A function that is known at some points, interpolated and extrapolated linearly."""

    x: Tensor  # ascending, at equal distances
    y: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Return the values at any points."""
        step = self.x[1] - self.x[0]
        i = ((z.detach() - self.x[0]) / step).floor().long().clamp(0, len(self.x) - 2)
        return self.y[i] + (self.y[i + 1] - self.y[i]) * ((z - self.x[i]) / step)


def activations(dry_run: DryRun, layers: Sequence[nn.Module]) -> list[Activation]:
    """Return what comes between each layer and the next, where that is a function of each value by itself.

    Modules and functions alike, as nothing but values are looked at. From one pass of a few samples.
    """
    last: list[Tensor] = []  # what the last layer has put out
    found: list[Activation] = []

    def enter(module: nn.Module, call: Call) -> None:
        x = first_tensor(call[0])
        if x is not None and last and x.shape == last[0].shape and (act := _function(last[1], _sample(x))):
            found.append(act)

    def leave(module: nn.Module, call: Call, output: Any) -> None:
        y = first_tensor(output)
        last[:] = [] if y is None else [y.new_empty(()).expand(y.shape), _sample(y)]

    dry_run.forward(dict.fromkeys(layers, leave), dict.fromkeys(layers, enter), part=first_samples)
    return found


def _sample(x: Tensor) -> Tensor:
    """Some values at places that depend on the shape alone, as a copy."""
    n = max(x.numel(), 1)
    return x.reshape(-1)[:: distance(n, n / _VALUES)].to("cpu", torch.float64, copy=True)


def _function(x: Tensor, y: Tensor) -> Activation | None:
    """The function that gives y for x, if there is one."""
    x, order = x.sort()
    y = y[order]
    rough, variance = (y[1:] - y[:-1]).square().mean(), y.var()
    if not (x[-1] > x[0] and rough <= _SMOOTH * variance):
        return None
    points = torch.linspace(float(x[0]), float(x[-1]), _POINTS, dtype=x.dtype, device=x.device)
    i = torch.searchsorted(x, points).clamp(1, len(x) - 1)
    share = ((points - x[i - 1]) / (x[i] - x[i - 1])).nan_to_num(0.0)
    return Activation(points, y[i - 1] + share * (y[i] - y[i - 1]))
