"""The exact step: what an affine layer's output tells its weights, in one go and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastai_lsuv.core import statistics
from fastai_lsuv.core.affine import AffineParameters, is_known_affine
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.statistics import Moments, on_host
from fastai_lsuv.core.target import EXACT

_LARGE = 1e30  # no weight that is scaled to a signal of ordinary size is beyond
_SINGLE = 1e-6  # how exactly single precision tells a variance


@dataclass(frozen=True)
class Step:
    """What turns an output y into scale * y + shift: numbers or one per channel, on the device of the output."""

    scale: Tensor
    shift: Tensor
    changed: Tensor  # whether scale and shift are other than 1 and 0
    constant: Tensor  # whether the output doesn't depend on the input
    finite: Tensor
    ratio: Tensor  # |mean| / std


@dataclass(frozen=True)
class Outcome:
    """A step as the host sees it: whether it holds in any channel, or in all."""

    changed: bool
    constant: bool
    finite: bool
    ratio: float


def exact_step(layer: Layer, y: Tensor, seen: Moments, is_constant: Tensor | None = None) -> Step:
    """Return the exact step for a layer with output `y`: W/s and (b - m)/s turn y = Wx + b into (y - m)/s.

    Decided on the device, without waiting for it: where nothing is to be done, the step is 1 and 0.
    """
    mean, std, target = seen.mean, seen.std, layer.target
    size = mean.abs()
    finite = size + std < torch.inf
    constant = std <= torch.finfo(y.dtype).eps * size
    if is_constant is not None:
        constant = constant | is_constant
    usable = finite & ~constant
    scale = torch.ones_like(std) if target.std is None else target.std / std
    close = EXACT / 2 * target.scale
    near = finite if target.std is None else (std - target.std).abs() <= close
    shift = torch.zeros_like(mean)
    if target.mean is not None:
        shift = target.mean - scale * mean
        near = near & ((mean - target.mean).abs() <= close if target.mean else size <= close)
    change = usable & ~near & _can_hold(layer.weights[0], scale)
    scale, shift = torch.where(change, scale, 1.0), torch.where(change, shift, 0.0)
    return Step(scale, shift, change, constant & finite, finite, ratio=torch.where(usable, size / std, 0.0))


def outcomes(steps: Sequence[Step]) -> list[Outcome]:
    """Return what became of all steps: the only wait for the device."""
    home = on_host([x.double() for step in steps for x in (step.changed, step.constant, step.finite, step.ratio)])
    return [
        Outcome(bool(changed.any()), bool(constant.any()), bool(finite.all()), float(ratio.max()))
        for changed, constant, finite, ratio in zip(*(home[i::4] for i in range(4)), strict=True)
    ]


def _can_hold(weight: Tensor, scale: Tensor) -> Tensor:
    """Whether the weight times `scale` is in its dtype: fp16 ends at 65504, fp32 short of what denormals need."""
    largest = torch.finfo(weight.dtype).max
    heaviest = weight.detach().abs().amax().to(scale) if largest < _LARGE else 1.0
    return scale * heaviest <= largest


def only_bias_varies(layer: Layer, y: Tensor, seen: Moments) -> Tensor | None:
    """Whether the output's variance is that of the layer's bias, as it is where no input comes through."""
    affine = layer.affine
    if affine is None or affine.bias is None or seen.mean.dim():
        return None
    bias = affine.bias.detach().to(seen.std.dtype) * affine.gain
    variance, wanted = seen.std.square() * ((seen.n - 1) / seen.n), bias.var(unbiased=False)
    return (variance - wanted).abs() <= max(_SINGLE, 4 * torch.finfo(y.dtype).eps) * wanted


def scaled(layer: Layer, y: Tensor, step: Step) -> Tensor:
    """Return the output scaled and shifted, in place where the output is surely the layer's own."""
    scale, shift, wide = step.scale, step.shift, torch.promote_types(y.dtype, torch.float32)
    if scale.dim():
        shape = [1] * y.dim()
        shape[layer.channel_dim(y) or 0] = -1
        scale, shift = scale.reshape(shape), shift.reshape(shape)
    scale, shift = scale.to(wide), shift.to(wide)
    if y.dtype == wide and is_known_affine(layer.module):
        if statistics.at_hand(y) and not scale.dim():
            return torch.add(shift, y, alpha=float(scale), out=y)
        return torch.addcmul(shift, y, scale, out=y)
    return (y.to(wide) * scale + shift).to(y.dtype)


def rescale(affine: AffineParameters, scale: Tensor, shift: Tensor, values: Sequence[Tensor] | None = None) -> None:
    """Make an output `scale` times what it is (or was, with weights of these `values`), plus `shift`."""
    values = values or affine.all
    scale, shift = scale.to(values[0].device), shift.to(values[0].device) / affine.gain
    factor = affine.per_channel(scale) if affine.per_channel and scale.dim() else scale
    for weight, value in zip(affine.scaled, values, strict=False):
        _assign(weight, value, factor)
    if affine.bias is not None:
        shape = values[-1].shape if scale.dim() else ()
        _assign(affine.bias, values[-1], scale.reshape(shape), shift.reshape(shape))


def _assign(parameter: Tensor, value: Tensor, factor: Tensor, offset: Tensor | None = None) -> None:
    """Set a parameter to value * factor + offset, rounded to a half precision only once."""
    parameter, value = parameter.data, value.data  # a forward that asks for gradients has saved the parameter
    wide = torch.promote_types(value.dtype, torch.float32)
    if offset is None and parameter.dtype == wide:  # large weights need no second copy
        torch.mul(value, factor.to(wide), out=parameter)
    else:
        result = value.to(wide) * factor.to(wide)
        parameter.copy_(result if offset is None else result + offset.to(wide))
