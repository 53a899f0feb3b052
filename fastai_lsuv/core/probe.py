"""Which parameters carry the scale and the shift of a module's output, found by running a copy of it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastai_lsuv.core.affine import AffineParameters
from fastai_lsuv.core.copies import tensors_in

T = TypeVar("T")
Run = Callable[[Any], Any]  # from inputs to the module's output, from the same random state each time


def first_tensor(output: Any) -> Tensor | None:
    """Return the first floating-point tensor of an output, however nested, or None; of a nested tensor its values."""
    if isinstance(output, Tensor) and output.layout is torch.strided and not output.is_nested:
        return output if output.is_floating_point() else None
    everything = chain((o for o in tree_leaves(output) if isinstance(o, Tensor)), tensors_in(output))
    return next((y for o in everything if (y := _dense(o)) is not None), None)


def _dense(o: Tensor) -> Tensor | None:
    if not o.is_floating_point():
        return None
    if o.is_nested:
        return o.values() if o.layout is torch.jagged else torch.cat([part.reshape(-1) for part in o.unbind()])
    return o if o.layout is torch.strided else None


def find_affine_parameters(
    run: Run,  # the module
    parameters: Sequence[Tensor],  # its own
    inputs: Any,  # of a call
    mixing: bool = True,  # layers only
    contains_layers: bool = False,  # whether other layers run inside it
    multiplied: Sequence[Tensor] = (),  # those that meet the input in a product
) -> AffineParameters | None:
    """Return the affine parameters among `parameters`, or None.

    A parameter carries scale if the output is linear in it and no longer depends on the input when it is zero; it
    carries shift if it only moves the mean. Where several carry scale, the last one does (in y = BAx, B). Where none
    does by itself, those that are multiplied with the input may together (in y = Ux + Vz).

    With `mixing`, a module counts only if an output is a sum over a parameter's elements. That parts layers from
    normalisations, LayerScale and embeddings, in which each output sees a single element.

    Raises:
        FloatingPointError: the output for these inputs isn't finite, or has no floating-point tensor.
    """
    probe = _Probe(run, parameters, inputs)
    if probe.has_another_way() or (contains_layers and probe.is_constant()):
        return None
    return probe.find(mixing) or probe.find_partners(multiplied)


def small_noise(inputs: T, samples: int = 2) -> T:
    """Return noise in the shape of `inputs`, of a few samples only: dead or exploded signals do no harm to it.

    Integer and boolean tensors (indices, masks) keep their values.
    """
    sizes = [o.shape[0] for o in tree_leaves(inputs) if isinstance(o, Tensor) and o.dim()]
    batch_size = sizes[0] if sizes else 0

    def shrink(o: Any) -> Any:
        if not isinstance(o, Tensor):
            return o
        few = o[:samples] if o.dim() and o.shape[0] == batch_size else o
        return torch.randn_like(few) if few.is_floating_point() else few.clone()

    return tree_map(shrink, inputs)


def _other(x: Any) -> Any:
    """Another input of the same kind."""
    if not isinstance(x, Tensor) or not x.dim():
        return x
    if x.is_floating_point():
        return x.flip(0) * 0.5 + torch.randn_like(x)
    return x.flip(tuple(range(x.dim())))


class _Probe:
    """Runs of one module with other values of its parameters."""

    def __init__(self, run: Run, parameters: Sequence[Tensor], inputs: Any) -> None:
        self.run, self.parameters, self.inputs = run, parameters, inputs
        self.others = tree_map(_other, inputs)

    @cached_property
    def output(self) -> Tensor:
        """The output as it is."""
        return self._output(self.inputs)

    def has_another_way(self) -> bool:
        """Whether the input reaches the output without these parameters, so that none of them can carry scale."""
        with suppress(FloatingPointError):  # 0/0 in a weight norm
            return self._depends_on_input({p: torch.zeros_like(p) for p in self.parameters})
        return False

    def is_constant(self) -> bool:
        """Whether the output depends on no input: a layer inside is zero."""
        return not self._depends_on_input({})

    def find(self, mixing: bool) -> AffineParameters | None:
        """The last carrier of scale, with its shift."""
        for weight in reversed(self.parameters):
            with suppress(FloatingPointError):
                if self._carry_scale([weight]) and (found := self._with_shift([weight])):
                    matrices = self._matrices(weight)
                    return replace(found, matrices=matrices or (weight,)) if matrices or not mixing else None
        return None

    def find_partners(self, multiplied: Sequence[Tensor]) -> AffineParameters | None:
        """Several carriers of scale, with their shift: all of these, or all but one that is ahead of another."""
        every = [p for p in self.parameters if any(p is other for other in multiplied)]
        additive = [p for p in self.parameters if not self._gain(p)]  # and what adds up with them, but the bias
        groups = [every, additive, *([p for p in every if p is not left] for left in every)]
        for weights in groups:
            with suppress(FloatingPointError):
                if len(weights) > 1 and self._carry_scale(weights) and (found := self._with_shift(weights)):
                    return replace(found, matrices=tuple(weights))
        return None

    def _matrices(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The parameters that are summed over: `weight`, or those of which it is only a gain."""
        if self._is_summed_over(weight):
            return (weight,)
        return tuple(p for p in self.parameters if p is not weight and self._is_summed_over(p))

    def _output(self, inputs: Any) -> Tensor:
        output = first_tensor(self.run(inputs))
        if output is None or not output.numel() or not output.isfinite().all():
            raise FloatingPointError("no finite output to examine")
        return output.detach().as_subclass(Tensor).clone()

    def _with(self, values: Mapping[Tensor, Tensor], inputs: Any = None) -> Tensor:
        with _set(values):
            return self._output(self.inputs if inputs is None else inputs)

    def _depends_on_input(self, values: Mapping[Tensor, Tensor]) -> bool:
        return not self._same(self._with(values), self._with(values, self.others))

    def _same(self, a: Tensor, b: Tensor) -> bool:
        rtol = max(1e-4, 16 * torch.finfo(a.dtype).eps)
        size = torch.maximum(a.abs().max(), b.abs().max())
        return a.shape == b.shape and bool(((a - b).abs() <= rtol * size).all())

    def _vanishes(self, y: Tensor) -> bool:
        return self._same(y + self.output, self.output)

    def _carry_scale(self, weights: Sequence[Tensor]) -> bool:
        zero = {w: torch.zeros_like(w) for w in weights}
        if self._depends_on_input(zero):
            return False
        value = {w: _nonzero(w) for w in weights}
        factor = -0.5  # a sign, for |w|, and a fraction, for round(w); a power of 2 is exact in any float, even TF32
        multiple = {w: factor * v for w, v in value.items()}
        off, once, other = (self._with(v) for v in (zero, value, multiple))
        return not self._same(once, off) and self._same(other - off, factor * (once - off))

    def _with_shift(self, weights: Sequence[Tensor]) -> AffineParameters | None:
        """Affine parameters with these weights, if nothing but a shift is left when they are zero."""
        weight, partners = weights[-1], tuple(weights[:-1])
        zero = {w: torch.zeros_like(w) for w in weights}
        for bias in self.parameters:
            if bias not in zero and (gain := self._gain(bias)):
                bare = self._with(zero | {bias: torch.zeros_like(bias)})
                if self._vanishes(bare):
                    return self._with_channels(AffineParameters(weight, bias, gain, partners=partners))
        off = self._with(zero)
        return self._with_channels(AffineParameters(weight, partners=partners)) if self._vanishes(off) else None

    def _gain(self, bias: Tensor) -> float:
        """By how much every output moves when 1 is added to `bias`; 0 if not all move alike."""
        moved = self._with({bias: bias + 1}) - self.output
        gain = moved.mean()
        alike = self._same(self.output + moved, self.output + gain)
        return float(gain) if alike and not self._same(self.output + gain, self.output) else 0.0

    def _is_summed_over(self, p: Tensor) -> bool:
        """Whether an output depends on more than one element of `p`: on both of two complementary random halves."""
        half = torch.rand(p.shape, device=p.device) < 0.5
        change = torch.randn_like(p) + p.abs().max()
        with suppress(FloatingPointError):
            first, second = (self._with({p: p + change * part}) for part in (half, ~half))
            return bool(((first != self.output) & (second != self.output)).any())
        return False

    def _with_channels(self, found: AffineParameters) -> AffineParameters:
        """The same with the dimensions of weight and output that count the channels, where there are such."""
        if found.partners:
            return found
        weight, value = found.weight, _nonzero(found.weight)
        off = self._with({weight: torch.zeros_like(weight)})
        part = self._with({weight: value}) - off
        for w_dim, y_dim in _equal_sizes(weight, self.output):
            factor = 2.0 ** (torch.arange(weight.shape[w_dim], device=value.device) % 3 - 1).to(value.dtype)
            scaled = self._with({weight: value * _along(factor, w_dim, value)}) - off
            per_channel_bias = found.bias is None or found.bias.numel() == len(factor)
            if per_channel_bias and self._same(scaled, part * _along(factor.to(part.dtype), y_dim, part)):
                return replace(
                    found,
                    per_channel=partial(_along, dim=w_dim, like=weight),
                    channel_dim=partial(_counted_from_end, y_dim - self.output.dim()),
                )
        return found


def _nonzero(p: Tensor) -> Tensor:
    return p.detach().clone() if p.count_nonzero() else torch.randn_like(p)


def _equal_sizes(weight: Tensor, output: Tensor) -> Iterator[tuple[int, int]]:
    for w_dim, size in enumerate(weight.shape):
        yield from ((w_dim, y_dim) for y_dim in range(output.dim() - 1, -1, -1) if output.shape[y_dim] == size > 1)


def _counted_from_end(dim: int, like: Tensor) -> int:
    return like.dim() + dim


def _along(factor: Tensor, dim: int, like: Tensor) -> Tensor:
    return factor.view([-1 if d == dim else 1 for d in range(like.dim())])


@contextmanager
def _set(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Give parameters other values for the length of a `with` block."""
    kept = {p: p.detach().clone() for p in values}
    with torch.no_grad():
        try:
            for p, value in values.items():
                p.data.copy_(value)
            yield
        finally:
            for p, value in kept.items():
                p.data.copy_(value)
