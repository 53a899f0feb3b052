"""Which layers end a residual branch: found by following what they put out through one pass, not by their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastai_lsuv.hooks import hooked
from fastai_lsuv.probe import first_tensor
from fastai_lsuv.rehearsal import Rehearsal

_SUMS = (torch.ops.aten.add, torch.ops.aten.add_, torch.ops.aten.sub, torch.ops.aten.sub_)


def branch_ends(rehearsal: Rehearsal, layers: Collection[nn.Module]) -> list[nn.Module]:
    """Run the model once, unchanged, and return those of `layers` with which residual branches end, one a branch.

    A residual branch is added to what it began from, or to what went past it through one layer at most. It
    ends with the layer whose output still has its scale when it comes to that sum: directly, through a view, ReLU or
    LayerScale, but not through a normalisation or a tanh.
    """
    trace = _Trace()
    with hooked(dict.fromkeys(layers, trace.leave), {rehearsal.model: trace.enter}), trace:
        rehearsal.forward()
    return trace.found


class _Trail(NamedTuple):
    """Where a tensor that depends on the input comes from."""

    calls: int = 0  # of layers that it has been through, a bit for each
    ends: frozenset[nn.Module] = frozenset()  # the last layers: twice their output would be twice the tensor
    is_stream: bool = False  # the sum of a residual branch and what went past it


class _Trace(TorchDispatchMode):
    """Sees every operation, and keeps the trail of the memory that it writes: views of it are the same to all."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and to import what would skip it takes seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trails: dict[StorageWeakRef, _Trail] = {}
        self.n_calls = 0
        self.found: list[nn.Module] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model: its inputs have been nowhere yet."""
        self._note((args, kwargs), _Trail())

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook of a layer: its output has been through it."""
        y = first_tensor(output)
        for _, trail in self._known(y):
            self._note(y, _Trail(trail.calls | 1 << self.n_calls, frozenset([module])))
            self.n_calls += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the trail of what comes out."""
        call = (args, kwargs or {})
        seen = self._known(call)
        calls, ends = 0, frozenset[nn.Module]()
        for _, trail in seen:
            calls, ends = calls | trail.calls, ends | trail.ends
        is_sum = len(seen) == 2 and getattr(func, "overloadpacket", None) in _SUMS
        branch = _branch(*seen) if is_sum else None
        if branch is not None:
            output, ends = func(*args, **call[1]), frozenset()
            self.found += branch.ends
        elif ends and isinstance(func, OpOverload):
            output, scales = _run_twice(func, call, {id(x) for x, trail in seen if trail.ends})
            ends = ends if scales else frozenset()
        else:
            output, ends = func(*args, **call[1]), frozenset()
        if seen:
            self._note(output, _Trail(calls, ends, is_stream=branch is not None))
        return output

    def _known(self, nested: Any) -> list[tuple[Tensor, _Trail]]:
        return [(x, self.trails[place]) for x, place in _placed(nested) if place in self.trails]

    def _note(self, nested: Any, trail: _Trail) -> None:
        for _, place in _placed(nested):
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


def _run_twice(func: OpOverload, call: Any, scaled: set[int]) -> tuple[Any, bool]:
    """Run an operation, and tell whether twice these inputs give twice the output."""
    doubled = tree_map(lambda o: _double(o, id(o) in scaled, func._schema.is_mutable), call)
    output = func(*call[0], **call[1])
    if torch.Tag.nondeterministic_seeded in func.tags:
        return output, False
    with suppress(Exception):  # one that asks for a certain memory layout
        pairs = zip(_tensors(output), _tensors(func(*doubled[0], **doubled[1])), strict=True)
        return output, all(torch.allclose(big, 2 * y, rtol=1e-3, atol=0) for y, big in pairs)
    return output, False


def _double(o: Any, is_scaled: bool, is_mutable: bool) -> Any:
    if not isinstance(o, Tensor) or not (is_scaled or is_mutable):
        return o
    return 2 * o if is_scaled else o.clone()


def _tensors(nested: Any) -> list[Tensor]:
    return [o for o in tree_leaves(nested) if isinstance(o, Tensor)]


def _placed(nested: Any) -> Iterator[tuple[Tensor, StorageWeakRef]]:
    """All tensors with the memory they lie in, which a weak reference keeps from being taken for another one."""
    for x in _tensors(nested):
        with suppress(NotImplementedError):  # sparse tensors lie in several places
            yield x, StorageWeakRef(x.untyped_storage())
