"""The exact step: what an affine unit's output tells its weights, in one go and on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastai_lsuv.core.layers import Unit
from fastai_lsuv.core.selection import is_known_affine
from fastai_lsuv.core.statistics import Moments, at_hand
from fastai_lsuv.learner.distributed import Ranks

_LARGE = 1e30  # no weight that is scaled to a signal of ordinary size is beyond
EXACT = 1e-3  # |mean - wanted| and |std - wanted| of an affine layer in a clean pass; of a wanted std below 1


class Step(NamedTuple):
    """What turns an output y into scale * y + shift: numbers or one a channel, on the device of the output."""

    scale: Tensor
    shift: Tensor
    flags: Tensor  # changed, constant, not finite: each for any channel; and the largest |mean| / std


def one_step(unit: Unit, y: Tensor, seen: Moments, ranks: Ranks) -> Step:
    """The exact step for an affine unit with output `y`: W/s and (b - m)/s turn y = Wx + b into (y - m)/s.

    `seen` are the moments of y, on all ranks together. Decided on the device, without waiting for it: where nothing
    is to be done, the step is 1 and 0.
    """
    mean, std, options = seen.mean, seen.std, unit.options
    shifts = unit.can_shift and options.mean is not None
    wanted_mean, wanted_std = options.mean or 0.0, options.std
    scale = torch.ones_like(std) if wanted_std is None else wanted_std / std
    shift = wanted_mean - scale * mean if shifts else torch.zeros_like(mean)
    finite = (mean + std).isfinite()
    close = EXACT / 2 * options.small
    near = finite if wanted_std is None else (std - wanted_std).abs() <= close
    if shifts:
        near = near & ((mean - wanted_mean).abs() <= close)
    constant = is_constant(unit, y, seen, ranks) & finite
    usable = finite & ~constant
    change = usable & ~near
    change = change & _can_hold(unit.parameters[0], scale)
    flags = torch.stack([change, constant, ~finite, torch.where(usable, mean.abs() / std, 0.0)])
    flags = flags.reshape(4, -1).amax(1)  # of any channel
    return Step(torch.where(change, scale, 1.0), torch.where(change, shift, 0.0), flags)


def _can_hold(weight: Tensor, scale: Tensor) -> Tensor:
    """Whether the weight times `scale` is in its dtype: fp16 ends at 65504, fp32 short of what denormals need."""
    largest = torch.finfo(weight.dtype).max
    heaviest = weight.detach().abs().amax().to(scale) if largest < _LARGE else 1.0
    return scale * heaviest <= largest


def is_constant(unit: Unit, y: Tensor, seen: Moments, ranks: Ranks) -> Tensor:
    """Whether the output (of a channel) doesn't depend on the input: no spread, or only that of the bias."""
    eps = torch.finfo(y.dtype).eps
    flat = seen.std <= eps * seen.mean.abs()
    if unit.carriers is None or (bias := unit.carriers.bias) is None or seen.mean.dim():
        return flat
    shift = bias.detach().double() if y.device.type != "mps" else bias.detach().float()
    only_bias = _near(seen.m2 / seen.n, (shift * unit.carriers.gain).var(unbiased=False), max(1e-6, 4 * eps))
    if at_hand(y) and not bool(only_bias):
        return flat  # the usual case, without the look at every value
    y = y.detach().as_subclass(Tensor)
    return flat | (only_bias & ranks.every(unit.name, (y == y[:1]).all()))


def _near(a: Tensor, b: Tensor, rtol: float) -> Tensor:
    return (a - b).abs() <= rtol * b


def scaled(unit: Unit, y: Tensor, step: Step) -> Tensor:
    """The output scaled and shifted, in place where the output is surely the layer's own."""
    shape = [1] * y.dim()
    if step.scale.dim():
        shape[unit.channel_dim(y, True) or 0] = -1
    wide = torch.promote_types(y.dtype, torch.float32)
    scale, shift = step.scale.to(wide).reshape(shape), step.shift.to(wide).reshape(shape)
    if y.dtype == wide and is_known_affine(unit.module):
        if at_hand(y) and not step.scale.dim():  # one way through memory, not two
            return torch.add(shift, y, alpha=float(scale), out=y)
        return y.mul_(scale).add_(shift)
    return (y.to(wide) * scale + shift).to(y.dtype)
