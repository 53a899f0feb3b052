"""How a gradient travels back through a network: by one backward pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from fastai_lsuv.core.bulk import on_host, sum_dtype
from fastai_lsuv.core.copies import tensors_in
from fastai_lsuv.core.dry_run import Call, DryRun
from fastai_lsuv.core.probe import first_tensor

WHOLE = 64  # samples: of a batch of no more the gradient comes from the pass that measures the result
SAMPLES = 8  # of a larger one, in a pass of their own: the limits of the verdict are orders of magnitude


class Gradient(NamedTuple):
    """How strongly the network's output depends on a layer's output y."""

    elasticity: float  # ‖g‖·‖y‖ / (‖v‖·‖out‖) of a random gradient v at the network's output
    growth: float  # the elasticity beside that in a linear network of random weights, √(values of y / values of out)


class _Seen(NamedTuple):
    """A call of a module."""

    module: nn.Module
    edge: GradientEdge
    n: int  # number of values
    norm: Sequence[Tensor]  # of them, in a pass of a few samples: these may be larger or smaller than the others


class Backprop:
    """Notes in a pass where gradients come through, and sends one back."""

    def __init__(self, dry_run: DryRun, is_due: bool) -> None:
        """`is_due`: a pass that measures the result will be made anyway."""
        self.dry_run = dry_run
        self.is_due = is_due and _n_samples(dry_run.call) <= WHOLE
        self.refused: Exception | None = None  # what a pass with gradients ended with
        self.begin()

    def begin(self) -> None:
        """Forget the pass before, and free what it has kept."""
        self.calls: list[_Seen] = []
        self.outputs: list[Tensor] = []

    def can_see(self, make_pass: Callable[[], None]) -> bool:
        """Make a pass that keeps what a gradient needs; return whether it can be made so."""
        self.begin()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # whatever is to be said of gradients, training will say
                make_pass()
        except Exception as error:
            self.is_due, self.refused = False, error
            self.begin()
        return self.is_due

    def see(self, module: nn.Module, call: Call, output: Any) -> None:
        """Note a call of a layer, or of the whole model."""
        y = first_tensor(output)
        if y is not None and y.grad_fn is not None and y.numel():
            of_samples = () if self.is_due else _norms([y])
            self.calls.append(_Seen(module, get_gradient_edge(y), y.numel(), of_samples))  # it may be changed in place
            if module is self.dry_run.model:
                self.outputs.append(y)

    def gradients(self, sizes: Mapping[nn.Module, float]) -> dict[nn.Module, Gradient]:
        """Return how strongly the network's output depends on that of each module: `sizes` has their root mean squares.

        The elasticity has no unit, so that layers of any scale compare; beside that of a linear network, so do layers
        of any shape. Of several calls the strongest counts. Modules through which no gradient can come are left out,
        and all of them if the model can't be differentiated.

        Raises:
            Exception: what the pass before ended with, if gradients do come through: they weren't the reason.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # whatever is to be said of gradients, training will say
                if not self.is_due:
                    see = dict.fromkeys([*sizes, self.dry_run.model], self.see)
                    self.dry_run.forward(see, part=first_samples, with_grad=True)
                found = self._backward([call for call in self.calls if call.module in sizes], sizes)
        except Exception:  # whatever a model's own backward may raise: that is no matter of its initialisation
            return {}
        finally:
            self.begin()
        if self.refused is not None:
            raise self.refused
        return found

    def _backward(self, calls: Sequence[_Seen], sizes: Mapping[nn.Module, float]) -> dict[nn.Module, Gradient]:
        (out,) = self.outputs
        v = torch.randn_like(out)
        came_back = torch.autograd.grad(out, [call.edge for call in calls], v, allow_unused=True)
        reached = [(call, g) for call, g in zip(calls, came_back, strict=True) if g is not None]
        of_samples = [norm for call, _ in reached for norm in call.norm]
        (of_v,), (of_out,), *norms = on_host([*_norms([v, out, *(g for _, g in reached)]), *of_samples])
        of_calls = [norm for (norm,) in norms[len(reached) :]]
        of_calls = of_calls or [sizes[call.module] * math.sqrt(call.n) for call, _ in reached]
        strongest: dict[nn.Module, Gradient] = {}
        for (call, _), (norm,), of_y in zip(reached, norms, of_calls, strict=False):
            elasticity = norm * of_y / (of_v * of_out) if of_v * of_out else math.nan
            gradient = Gradient(elasticity, elasticity / math.sqrt(call.n / out.numel()))
            strongest[call.module] = max(strongest.get(call.module, gradient), gradient)
        return strongest


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms in one operation, where a device has one for it."""
    return list(torch._foreach_norm([t.detach() for t in tensors], 2, sum_dtype(tensors[0])))


def _n_samples(call: Call) -> int:
    batch = next(tensors_in(call), None)
    return len(batch) if batch is not None and batch.dim() else 0


def first_samples(call: Call) -> Call:
    """Return the first samples of a batch: of each tensor that has as many as the first.

    Raises:
        ValueError: they are in an object of the user's own.
    """
    n = _n_samples(call)
    if n <= SAMPLES:
        return call
    some: Call = tree_map(lambda o: o[:SAMPLES] if isinstance(o, Tensor) and o.dim() and len(o) == n else o, call)
    if len(next(tensors_in(some))) == n:
        raise ValueError("the batch can't be cut")
    return some
