"""In which parameters a tensor is linear, told by what each operation does to a multiple of what it takes.

So that a whole model with weights of its own can be judged without running it again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

from fastai_lsuv.core.affine import AffineParameters
from fastai_lsuv.core.tracing import placed, tensors

_FACTOR = -0.7  # a sign and a fraction: neither a homogeneous nor a rounded function passes for linear
_Weights = frozenset[Tensor]
_Carrier = tuple[Tensor, _Weights]  # an input of an operation, and the parameters in which it is linear
_Outputs = list[Tensor] | None  # of an operation; None where it can't be run on other values


class _Line(NamedTuple):
    """How a tensor depends on parameters."""

    linear: _Weights = frozenset()  # a multiple of all these is that multiple of the tensor
    bent: _Weights = frozenset()  # parameters on which it depends in another way
    shift: Mapping[Tensor, float] = {}  # adding 1 to such a parameter adds so much to every element

    @property
    def carriers(self) -> _Weights:
        return self.linear - self.bent


class Linearity:
    """Follows parameters through the operations of a pass."""

    def __init__(self, parameters: Collection[Tensor]) -> None:
        self.lines: dict[StorageWeakRef, _Line] = {}
        self.begin(parameters)

    def begin(self, parameters: Collection[Tensor]) -> None:
        """Follow parameters from now on."""
        for p in parameters:
            for _, place in placed(p):
                self.lines.setdefault(place, _Line(frozenset([p]), shift={p: 1.0}))

    def ahead(self, func: OpOverload, call: Any, multiplied: _Weights) -> Callable[[Any], None] | None:
        """Try an operation on other values, before it is run; return what notes what it puts out."""
        taken = [(x, self.lines[place]) for x, place in placed(call) if place in self.lines] if self.lines else []
        if not taken:
            return None
        carrying = [(x, line.carriers) for x, line in taken if line.carriers]
        attempts = [
            (_union(which for _, which in some), _varied(func, call, {id(x): _FACTOR * x for x, _ in some}))
            for some in _choices(carrying, multiplied)
        ]
        shifted = {
            b: _varied(func, call, {id(x): x + line.shift[b] for x, line in taken if b in line.shift})
            for b in {b for _, line in taken for b in line.shift}
        }
        everything = _union(line.linear | line.bent for _, line in taken)
        bent = _union(line.bent for _, line in taken)

        def note(output: Any) -> None:
            for i, (y, place) in enumerate(placed(output)):
                linear = next((which for which, got in attempts if got and _is_multiple(got[i], y)), frozenset())
                line = _Line(linear, bent | (everything - linear), _shifts(shifted, y, i))
                is_part = func._schema.is_mutable and y.numel() < y.untyped_storage().nbytes() // y.element_size()
                self.lines[place] = _Line(bent=everything) if is_part else line

        return note

    def affine_parameters(self, y: Tensor, multiplied: Collection[_Weights]) -> AffineParameters | None:
        """Return those through which `y` is scaled and shifted, given what is multiplied with the input."""
        line = next((self.lines[place] for _, place in placed(y) if place in self.lines), _Line())
        weights = {w: None for which in multiplied for w in which if w in line.carriers}
        if not weights:
            return None
        weight = [*weights][-1]
        bias = next((b for b in line.shift if b in line.carriers and b not in weights), None)
        matrices = {max(which, key=Tensor.numel) for which in multiplied if which & line.carriers}
        return AffineParameters(
            weight,
            bias,
            1.0 if bias is None else line.shift[bias],
            matrices=tuple(matrices),
            partners=tuple(line.carriers - {weight, bias}),
        )


def _choices(carrying: list[_Carrier], multiplied: _Weights) -> list[list[_Carrier]]:
    """Which of an operation's inputs may carry the scale of what it puts out together.

    All of them, in a sum; of those that are multiplied with each other the last one that isn't a mere gain.
    """
    if not carrying:
        return []
    gains = [pair for pair in carrying if pair[1].isdisjoint(multiplied)]
    weights = [pair for pair in carrying if not pair[1].isdisjoint(multiplied)]
    but_one = [[other for other in carrying if other is not pair] for pair in (*gains, *weights)]
    return [carrying, *(some for some in but_one if some), *([pair] for pair in reversed([*gains, *weights]))]


def _union(sets: Any) -> _Weights:
    return frozenset[Tensor]().union(*sets)


def _varied(func: OpOverload, call: Any, new: Mapping[int, Tensor]) -> _Outputs:
    """What an operation makes of other values for some of what it takes."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    is_mutable = func._schema.is_mutable

    def other(o: Any) -> Any:
        if id(o) in new:
            return new[id(o)]
        return o.clone() if is_mutable and isinstance(o, Tensor) else o

    with suppress(Exception):
        args, kwargs = tree_map(other, call)
        return tensors(func(*args, **kwargs))
    return None


def _is_multiple(got: Tensor, y: Tensor) -> bool:
    return _is_near(got, _FACTOR * y, y)


def _shifts(shifted: Mapping[Tensor, _Outputs], y: Tensor, i: int) -> dict[Tensor, float]:
    """By how much every element moves, of those parameters that move all alike."""
    found = {}
    for b, outputs in shifted.items():
        if outputs is not None and y.is_floating_point() and y.numel():
            moved = (outputs[i] - y).mean()
            if _is_near(outputs[i], y + moved, y) and not _is_near(outputs[i], y, y):
                found[b] = float(moved)
    return found


def _is_near(a: Tensor, b: Tensor, y: Tensor) -> bool:
    if not (y.is_floating_point() or y.is_complex()) or a.shape != b.shape:
        return False
    size = torch.maximum(a.abs().amax(), b.abs().amax()) if y.numel() else 0.0
    return bool(((a - b).abs() <= max(1e-4, 16 * torch.finfo(y.dtype).eps) * size).all())
