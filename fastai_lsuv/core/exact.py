"""The exact step: what an affine layer's output tells its weights, in one go and on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastai_lsuv.core import statistics
from fastai_lsuv.core.affine import AffineParameters, is_known_affine
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.statistics import Measured, Moments, at_least_single, fetched, on_host
from fastai_lsuv.core.target import EXACT

_LARGE = 1e30  # no weight that is scaled to a signal of ordinary size is beyond
_SINGLE = 1e-6  # how exactly single precision tells a variance


@dataclass(frozen=True)
class Step:
    """What turns an output y into scale * y + shift: numbers or one per channel, on the device of the output."""

    seen: Moments
    eps: float  # of the output's type
    scale: Tensor
    shift: Tensor
    changed: Tensor  # whether scale and shift are other than 1 and 0
    is_same: Tensor | None = None  # whether all samples give the same, if that was looked at
    bias_var: Tensor | None = None  # variance of what the bias alone puts out, if the output may be nothing else


@dataclass(frozen=True)
class Outcome:
    """What became of a step: whether it holds in any channel, or in all."""

    changed: bool
    constant: bool  # the output doesn't depend on the input
    finite: bool
    ratio: float  # |mean| / std
    suspect: bool  # the output varies just as the bias does: are all samples the same?


def exact_step(layer: Layer, y: Tensor, seen: Moments, examine: bool) -> Step:
    """Return the exact step for a layer with output `y`: W/s and (b - m)/s turn y = Wx + b into (y - m)/s.

    Decided on the device, without waiting for it, and in few operations: where nothing is to be done, the step is 1
    and 0. To `examine` an output is to look whether all samples give the same; where a value can be read at no cost
    that is done as soon as there is reason to.
    """
    mean, std, target, eps = seen.mean, seen.std, layer.target, torch.finfo(y.dtype).eps
    size, inverse = mean.abs(), std.reciprocal()
    scale = torch.ones_like(std) if target.std is None else inverse if target.std == 1 else inverse * target.std
    # NaN passes none of these: neither a constant output (0/0 or beyond 1/eps) nor one with infinite values in it
    change = (size * inverse < 1 / eps) & (inverse > 0) & _can_hold(layer.weights[0], scale)
    bias_var = _variance_of_bias(layer, seen)
    examine = examine or (bias_var is not None and statistics.at_hand(y) and _varies_as(seen.on_host(), bias_var, eps))
    is_same = (y == y[:1]).all() if examine else None
    if is_same is not None:
        change = change & ~is_same
    close = EXACT / 2 * target.scale
    far = None if target.std is None else (std - target.std).abs() > close
    if target.mean is None:
        shift = torch.zeros_like(mean)
    else:
        shift = target.mean - scale * mean
        off = (mean - target.mean).abs() > close if target.mean else size > close
        far = off if far is None else far | off
    change = change & far  # type: ignore[operator]
    keep = ~change
    scale, shift = scale.masked_fill(keep, 1.0), shift.masked_fill(keep, 0.0)
    return Step(seen, eps, scale, shift, change, is_same, None if examine else bias_var)


def outcomes(steps: Sequence[Step]) -> list[Outcome]:
    """Return what became of all steps: the only wait for the device."""
    seen = fetched([step.seen for step in steps])
    changed = on_host([step.changed for step in steps])
    is_same = _known([step.is_same for step in steps])
    bias_var = _known([step.bias_var for step in steps])
    return [_outcome(*each) for each in zip(steps, seen, changed, is_same, bias_var, strict=True)]


def _known(tensors: Sequence[Tensor | None]) -> list[float | None]:
    values = iter(on_host([t for t in tensors if t is not None]))
    return [None if t is None else next(values)[0] for t in tensors]


def _outcome(
    step: Step, seen: Measured, changed: tuple[float, ...], is_same: float | None, bias_var: float | None
) -> Outcome:
    pairs = [(abs(mean), std) for mean, std in zip(seen.mean, seen.std, strict=True)]
    finite = [pair for pair in pairs if sum(pair) < math.inf]
    varying = [size / std for size, std in finite if std > step.eps * size and not is_same]
    constant = len(varying) < len(finite)
    suspect = bias_var is not None and not constant and _varies_as(seen, bias_var, step.eps)
    return Outcome(any(changed), constant, len(finite) == len(pairs), max(varying, default=0.0), suspect)


def _can_hold(weight: Tensor, scale: Tensor) -> Tensor:
    """Whether the weight times `scale` is in its dtype: fp16 ends at 65504, fp32 short of what denormals need."""
    largest = torch.finfo(weight.dtype).max
    if largest > _LARGE:
        return scale <= largest
    return scale * weight.abs().amax().to(scale) <= largest


def _variance_of_bias(layer: Layer, seen: Moments) -> Tensor | None:
    """The variance of what the bias alone puts out, as an output is to which no input comes through."""
    if layer.affine is None or layer.affine.bias is None or seen.mean.dim():
        return None
    bias = layer.affine.bias.to(seen.std.dtype)
    return (bias if layer.affine.gain == 1 else bias * layer.affine.gain).var(unbiased=False)


def _varies_as(seen: Measured, bias_var: Tensor | float, eps: float) -> bool:
    variance, wanted = seen.std[0] ** 2 * (seen.n - 1) / seen.n, float(bias_var)
    return abs(variance - wanted) <= max(_SINGLE, 4 * eps) * wanted


def scaled(layer: Layer, y: Tensor, step: Step) -> Tensor:
    """Return the output scaled and shifted, in place where the output is surely the layer's own."""
    scale, shift, wide = step.scale, step.shift, at_least_single(y.dtype)
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
    scale, shift = scale.to(values[0].device), shift.to(values[0].device)
    shift = shift if affine.gain == 1 else shift / affine.gain
    factor = affine.per_channel(scale) if affine.per_channel and scale.dim() else scale
    for weight, value in zip(affine.scaled, values, strict=False):
        _assign(weight, value, factor)
    if affine.bias is not None:
        if scale.dim():
            scale, shift = scale.reshape(values[-1].shape), shift.reshape(values[-1].shape)
        _assign(affine.bias, values[-1], scale, shift)


def _assign(parameter: Tensor, value: Tensor, factor: Tensor, offset: Tensor | None = None) -> None:
    """Set a parameter to value * factor + offset, rounded to a half precision only once."""
    is_own = value is parameter
    parameter = parameter.data  # a forward that asks for gradients has saved the parameter, and must not notice
    value = parameter if is_own else value
    wide = at_least_single(value.dtype)
    if parameter.dtype == wide:  # large weights need no second copy
        torch.mul(value, factor.to(wide), out=parameter)
        if offset is not None:
            parameter.add_(offset.to(wide))
    else:
        result = value.to(wide) * factor.to(wide)
        parameter.copy_(result if offset is None else result + offset.to(wide))
