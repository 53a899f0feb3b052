"""The exact step: what an affine layer's output tells its weights, in one go and on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastai_lsuv.core import statistics
from fastai_lsuv.core.affine import AffineParameters, is_known_affine
from fastai_lsuv.core.bulk import alike, on_host, sum_dtype
from fastai_lsuv.core.layers import Layer
from fastai_lsuv.core.statistics import Measured, Moments, at_least_single, fetched
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


def exact_step(layer: Layer, y: Tensor, seen: Moments, bias_var: Tensor | None = None, examine: bool = False) -> Step:
    """Return the exact step for a layer with output `y`: W/s and (b - m)/s turn y = Wx + b into (y - m)/s.

    Decided on the device, without waiting for it, and in few operations: where nothing is to be done, the step is 1
    and 0. To `examine` an output is to look whether all samples give the same; where a value can be read at no cost
    that is done as soon as there is reason to.
    """
    mean, std, target, eps = seen.mean, seen.std, layer.target, torch.finfo(y.dtype).eps
    inverse = std.reciprocal()
    ratio = mean * inverse
    scale = torch.ones_like(std) if target.std is None else inverse if target.std == 1 else inverse * target.std
    at_mean = ratio if target.std == 1 else scale * mean
    shift = torch.zeros_like(mean) if target.mean is None else target.mean - at_mean
    off_std, off_mean = (
        torch.zeros_like(x) if wanted is None else x - wanted if wanted else x
        for x, wanted in ((std, target.std), (mean, target.mean))
    )
    distance = torch.hypot(off_std, off_mean)
    # NaN passes none of these: neither a constant output (0/0 or beyond 1/eps) nor one with infinite values in it
    change = (ratio.abs() < 1 / eps) & _can_hold(layer.weights[0], scale, distance)
    change &= distance > EXACT / 2 * target.scale
    bias_var = None if mean.dim() else bias_var
    examine = examine or (bias_var is not None and statistics.at_hand(y) and _varies_as(seen.on_host(), bias_var, eps))
    is_same = (y == y[:1]).all() if examine else None
    if is_same is not None:
        change = change & ~is_same
    keep = ~change
    scale, shift = scale.masked_fill(keep, 1.0), shift.masked_fill(keep, 0.0)
    return Step(seen, eps, scale, shift, change, is_same, None if examine else bias_var)


def variances_of_biases(layers: Sequence[Layer]) -> dict[Layer, Tensor]:
    """Return the variance of what the bias alone puts out, as an output is to which no input comes through."""
    biased = [(layer, layer.affine.bias) for layer in layers if layer.affine and layer.affine.bias is not None]
    found: dict[Layer, Tensor] = {}
    for which in alike([bias for _, bias in biased]):
        biases = torch.stack([biased[i][1].detach() for i in which]).reshape(len(which), -1)
        variances = biases.to(sum_dtype(biases)).var(1, correction=0).unbind()
        for i, var in zip(which, variances, strict=True):
            layer, gain = biased[i][0], biased[i][0].affine.gain  # type: ignore[union-attr]
            found[layer] = var if gain == 1 else var * gain**2
    return found


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


def _can_hold(weight: Tensor, scale: Tensor, distance: Tensor) -> Tensor:
    """Whether the weight times `scale` is in its dtype: fp16 ends at 65504, fp32 short of what denormals need.

    The `distance` from the target is infinite where the std is, and so is their product.
    """
    largest = torch.finfo(weight.dtype).max
    if largest > _LARGE:
        return scale * distance < largest
    return (scale * weight.abs().amax().to(scale) <= largest) & (distance < math.inf)


def _varies_as(seen: Measured, bias_var: Tensor | float, eps: float) -> bool:
    variance, wanted = seen.std[0] ** 2 * (seen.n - 1) / seen.n, float(bias_var)
    return abs(variance - wanted) <= max(_SINGLE, 4 * eps) * wanted


def scaled(layer: Layer, y: Tensor, step: Step) -> Tensor:
    """Return the output scaled and shifted, in place where the output is surely the layer's own."""
    wide = at_least_single(y.dtype)
    scale, shift = step.scale.to(wide), step.shift.to(wide)
    channels = (layer.channel_dim(y) or 0) if scale.dim() else None
    if y.dtype != wide and channels in (None, 1) and y.dim() > 1 and _norm_keeps_layout(y):
        corrected = _rounded_once(y, scale, shift)
    else:
        if channels is not None:
            scale, shift = (x.reshape([-1 if d == channels else 1 for d in range(y.dim())]) for x in (scale, shift))
        if y.dtype == wide and is_known_affine(layer.module):
            if statistics.at_hand(y) and not scale.dim():
                return torch.add(shift, y, alpha=float(scale), out=y)
            return torch.addcmul(shift, y, scale, out=y)
        corrected = (y.to(wide) * scale + shift).to(y.dtype)
    if y.grad_fn is None:
        return corrected
    y.data = corrected  # the graph that leads to it is that of the corrected weights, too
    return y


def _norm_keeps_layout(y: Tensor) -> bool:
    """Whether a norm puts out what lies in memory as its input does, as the model may take a view of it."""
    in_order = y.is_contiguous() or (y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last))
    return in_order and y.device.type in ("cpu", "cuda")


def _rounded_once(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift half precisions in single, value by value, as a norm in evaluation does: no copy in single."""
    n = y.shape[1]
    mean, variance = scale.new_zeros(n), scale.new_ones(n)
    scale, shift = scale.expand(n).contiguous(), shift.expand(n).contiguous()
    return torch.batch_norm(y, scale, shift, mean, variance, False, 0.0, 0.0, False)


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
        if offset is None:
            torch.mul(value, factor.to(wide), out=parameter)
        else:
            torch.addcmul(offset.to(wide), value, factor.to(wide), out=parameter)
    else:
        result = value.to(wide) * factor.to(wide)
        parameter.copy_(result if offset is None else result + offset.to(wide))
