"""Which parameters a model multiplies its input by, found by following both through one pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastai_lsuv.core.copies import tensors_in
from fastai_lsuv.core.dry_run import Call
from fastai_lsuv.core.linearity import Linearity
from fastai_lsuv.core.tracing import SHAPED, Trace, placed, tensors

_ATEN = torch.ops.aten
Weights = frozenset[Tensor]


def _named(names: str) -> list[Any]:
    return [getattr(_ATEN, name) for name in names.split() if hasattr(_ATEN, name)]


# Operations that multiply some of what they take with each other and sum, with the places of those.
_FACTORS: dict[Any, slice] = {
    **dict.fromkeys(_named("mm bmm mv dot vdot matmul linear einsum _sparse_mm _grouped_mm _trilinear"), slice(0, 3)),
    **dict.fromkeys(_named("addmm baddbmm addbmm addmv _addmm_activation _sparse_addmm"), slice(1, 3)),
    **dict.fromkeys(_named("convolution _convolution convolution_overrideable"), slice(0, 2)),
    **dict.fromkeys(_named("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"), slice(0, 2)),
    **dict.fromkeys(
        _named(
            "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
            "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_cudnn_attention"
        ),
        slice(0, 3),
    ),
    _ATEN.linear: slice(0, 2),
}
_GAINS = _named("mul mul_")  # in the complex numbers of a Fourier transform, a convolution
_LOOKUPS = _named("index index_select embedding")


class _Trail(NamedTuple):
    """What a tensor is computed from."""

    weights: Weights = frozenset()  # from these and constants alone, unless it depends on the input
    meets_input: bool = False
    heads: frozenset[nn.Module] = frozenset()  # layers of interest whose output it comes from


class Products(Trace):
    """Follows weights and input, by the memory that they lie in, until they meet in a product."""

    def __init__(self, weights: Collection[Tensor], judged: Collection[Tensor], heads: Collection[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trails: dict[StorageWeakRef, _Trail] = {}
        self.home = {place: w for w in weights for _, place in placed(w)}
        self.trails |= {place: _Trail(frozenset([w])) for place, w in self.home.items()}
        self.linearity = Linearity(judged)
        self.heads = set(heads)  # layers of which it is asked whether another layer takes what they put out
        self.multiplied: list[Weights] = []  # weights of one factor together, in the order in which they are used
        self.users: dict[Tensor, set[nn.Module]] = {}  # modules that were at work when a weight was used
        self.at_work: list[nn.Module] = []
        self.is_paused = False

    @property
    def all_multiplied(self) -> Weights:
        """All weights that have met the input."""
        return Weights().union(*self.multiplied)

    def enter(self, module: nn.Module, call: Call) -> None:
        """Before a module; the first one takes the input of the whole."""
        if not self.at_work:
            self._note([*tensors_in(call)], _Trail(meets_input=True))
        self.at_work.append(module)

    def leave(self, module: nn.Module, call: Call, output: Any, is_layer: bool) -> None:
        """After a module. What a layer puts out is data, even if it was made from weights alone."""
        while self.at_work and self.at_work.pop() is not module:
            pass  # one that has raised
        if is_layer:
            self.heads -= {head for x, trail in self._known([*tensors_in(call)]) for head in trail.heads}
            self._note([*tensors_in(output)], _Trail(meets_input=True, heads=frozenset(self.heads & {module})))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away for the length of a `with` block."""
        is_innermost = _get_current_dispatch_mode() is self
        self.is_paused = True
        if is_innermost:  # so that operations don't even come here
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.is_paused = False
            if is_innermost:
                self.__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what comes out of what."""
        call = (args, kwargs or {})
        packet = getattr(func, "overloadpacket", None)  # operations of higher order have none
        is_followed = self.at_work and not self.is_paused and packet not in SHAPED
        seen = self._known(call) if is_followed else []
        if not seen:
            return func(*args, **call[1])
        self._note_use(func, seen)
        self._note_product(packet, args)
        note = self.linearity.ahead(func, call, self.all_multiplied) if isinstance(func, OpOverload) else None
        output = func(*args, **call[1])
        self._note(output, _behind(packet, args, seen))
        if note is not None:
            note(output)
        return output

    def _note_use(self, func: Any, seen: list[tuple[Tensor, _Trail]]) -> None:
        returns = func._schema.returns if isinstance(func, OpOverload) else ()
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return  # a view
        used = [self.home[place] for x, trail in seen if trail.weights for _, place in placed(x) if place in self.home]
        for weight in used:
            self.users.setdefault(weight, set()).add(self.at_work[-1])
        if len(self.at_work) == 1:  # by the model's own forward
            self.linearity.begin(used)

    def _note_product(self, packet: Any, args: Any) -> None:
        if packet in _FACTORS:
            factors = args[_FACTORS[packet]]
        elif packet in _GAINS and any(x.is_complex() for x in tensors(args)):
            factors = args
        else:
            return
        trails = [trail for _, trail in self._known(factors)]
        if any(trail.meets_input for trail in trails):
            found = (trail.weights for trail in trails if trail.weights and not trail.meets_input)
            self.multiplied += [weights for weights in found if weights not in self.multiplied]

    def _known(self, nested: Any) -> list[tuple[Tensor, _Trail]]:
        return [(x, self.trails[place]) for x, place in placed(nested) if place in self.trails]

    def _note(self, nested: Any, trail: _Trail) -> None:
        for _, place in placed(nested):
            if place not in self.home:  # a module that hands on its weight makes no input of it
                self.trails[place] = trail


def _behind(packet: Any, args: Any, seen: list[tuple[Tensor, _Trail]]) -> _Trail:
    """What comes out depends on all that goes in. An entry of a table is data; a matrix of a stack is a weight."""
    if packet in _LOOKUPS:
        table = next((trail for x, trail in seen if x is args[0]), _Trail())
        if table.weights:
            n_indices = len(tensors(args[1])) if packet is _ATEN.index else 1
            return table if args[0].dim() - n_indices > 1 else _Trail(meets_input=True)
    trails = [trail for _, trail in seen]
    meets_input = any(trail.meets_input for trail in trails)
    heads = frozenset[nn.Module]().union(*(trail.heads for trail in trails))
    weights = frozenset[Tensor]().union(*(trail.weights for trail in trails))
    return _Trail(frozenset() if meets_input else weights, meets_input, heads)
