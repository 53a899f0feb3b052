"""Which layers end a residual branch: found by following what they put out through one pass, not by their names."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

from fastai_lsuv.core.dry_run import Call, DryRun
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.core.tracing import SHAPED, Trace, placed, tensors

_SUMS = [getattr(torch.ops.aten, name) for name in ("add", "add_", "sub", "sub_", "rsub", "lerp", "lerp_")]


def branch_ends(dry_run: DryRun, layers: Collection[nn.Module]) -> list[nn.Module]:
    """Run the model once, unchanged, and return those of `layers` with which residual branches end, one a branch.

    A residual branch is added to what it began from, or to what went past it through one layer at most. It
    ends with the layer whose output still has its scale when it comes to that sum: directly, through a view, ReLU or
    LayerScale, but not through a normalisation or a tanh. A branch that begins at zero on purpose is bounded already:
    it has no end here.
    """
    trace = _Trace()
    with trace:
        dry_run.forward(dict.fromkeys(layers, trace.leave), {dry_run.model: trace.enter})
    return trace.found


class _Trail(NamedTuple):
    """Where a tensor that depends on the input comes from."""

    calls: int = 0  # of layers that it has been through, a bit for each
    ends: frozenset[nn.Module] = frozenset()  # the last layers: twice their output would be twice the tensor
    bent: frozenset[nn.Module] = frozenset()  # layers on whose scale it depends in another way: squared, in a tanh
    is_stream: bool = False  # the sum of a residual branch and what went past it

    def after(self, degree: int | None) -> _Trail:
        """Behind an operation whose output has the scale of its inputs (1), none (0), or depends on it in other ways.

        What is multiplied with a function of itself, as in a norm, has its scale no longer.
        """
        if degree == 1 and not self.ends & self.bent:
            return _Trail(self.calls, self.ends, self.bent)
        return _Trail(self.calls, frozenset(), self.bent if degree == 0 else self.bent | self.ends)


class _Trace(Trace):
    """Keeps the trail of the memory that operations write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trails: dict[StorageWeakRef, _Trail] = {}
        self.n_calls = 0
        self.found: list[nn.Module] = []

    def enter(self, module: nn.Module, call: Call) -> None:
        """Before the model: its inputs have been nowhere yet."""
        self._note(call, _Trail())

    def leave(self, module: nn.Module, call: Call, output: Any) -> None:
        """After a layer: its output has been through it."""
        y = first_tensor(output)
        known = self._known(y)
        if not self.trails:  # inputs in an object of one's own: what the first layer gets stands for them
            self._note(call, _Trail())
            known = [(x, _Trail()) for x in tensors(y)]
        for _, trail in known:
            self._note(y, _Trail(trail.calls | 1 << self.n_calls, frozenset([module])))
            self.n_calls += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the trail of what comes out."""
        call = (args, kwargs or {})
        packet = getattr(func, "overloadpacket", None)  # operations of higher order have none
        seen = [] if packet in SHAPED else self._known(call)
        added = self._known(args) if packet in _SUMS else []  # without `out=`
        branch = _branch(*added) if len(added) == 2 else None
        before = _merged([trail for _, trail in seen])
        if branch is not None:
            self.found += branch.ends
            output = func(*args, **call[1])
            self._note(output, _Trail(before.calls, is_stream=True))
        elif before.ends and isinstance(func, OpOverload):
            output, degrees = _run_twice(func, call, {id(x) for x, trail in seen if trail.ends})
            for y, degree in zip(tensors(output), degrees, strict=True):
                self._note(y, before.after(degree))
        else:
            output = func(*args, **call[1])
            if seen:
                self._note(output, before.after(None))
        return output

    def _known(self, nested: Any) -> list[tuple[Tensor, _Trail]]:
        return [(x, self.trails[place]) for x, place in placed(nested) if place in self.trails]

    def _note(self, nested: Any, trail: _Trail) -> None:
        for _, place in placed(nested):
            self.trails[place] = trail


def _branch(one: tuple[Tensor, _Trail], other: tuple[Tensor, _Trail]) -> _Trail | None:
    """Of two things that are added, the residual branch, if one is."""
    if one[0].shape != other[0].shape:
        return None
    (_, a), (_, b) = one, other
    only_a, only_b = (a.calls & ~b.calls).bit_count(), (b.calls & ~a.calls).bit_count()
    if a.is_stream != b.is_stream and only_a and only_b:  # side by side: (x + attention(x)) + mlp(x)
        return b if a.is_stream else a
    if only_a == only_b or min(only_a, only_b) > 1:
        return None
    return a if only_a > only_b else b


def _merged(trails: list[_Trail]) -> _Trail:
    calls, ends, bent = 0, frozenset[nn.Module](), frozenset[nn.Module]()
    for trail in trails:
        calls, ends, bent = calls | trail.calls, ends | trail.ends, bent | trail.bent
    return _Trail(calls, ends, bent)


def _run_twice(func: OpOverload, call: Any, scaled: set[int]) -> tuple[Any, list[int | None]]:
    """Run an operation, and tell of each output whether a multiple of these inputs gives that multiple of it."""
    enlarged, factor = None, 2.0
    with suppress(Exception):  # a kind of tensor that can't be multiplied
        factor = _factor([x for x in tensors(call) if id(x) in scaled])
        enlarged = tree_map(lambda o: _enlarged(o, factor, id(o) in scaled, func._schema.is_mutable), call)
    output = func(*call[0], **call[1])
    outputs = tensors(output)
    if enlarged is not None and torch.Tag.nondeterministic_seeded not in func.tags:
        with suppress(Exception):  # one that asks for a certain memory layout
            large = tensors(func(*enlarged[0], **enlarged[1]))
            is_same_memory = any(r.alias_info is not None for r in func._schema.returns)  # a view may see zeros only
            degrees = [_degree(y, big, factor, is_same_memory) for y, big in zip(outputs, large, strict=True)]
            return output, degrees
    return output, [None] * len(outputs)


def _degree(y: Tensor, big: Tensor, factor: float, may_be_zero: bool) -> int | None:
    if y.dtype.is_floating_point or y.dtype.is_complex:
        if torch.allclose(big, factor * y, rtol=1e-3, atol=0, equal_nan=True):
            return 1 if may_be_zero or y.count_nonzero() else 0  # a norm whose weight begins at 0 hides that it is one
        return 0 if torch.allclose(big, y, rtol=1e-3, atol=0, equal_nan=True) else None
    return 0 if torch.equal(big, y) else None


def _factor(tensors: list[Tensor]) -> float:
    """2, or the power of 2 that brings the largest value above 2: tiny ones come through a tanh with their scale."""
    largest = max(torch.linalg.vector_norm(x, torch.inf).item() for x in tensors)
    return 2.0 ** min(max(1, 2 - math.frexp(largest)[1]), 100)


def _enlarged(o: Any, factor: float, is_scaled: bool, is_mutable: bool) -> Any:
    if not isinstance(o, Tensor) or not (is_scaled or is_mutable):
        return o
    return factor * o if is_scaled else o.clone()
