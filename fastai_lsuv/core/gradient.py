"""How a gradient travels back through a network: by one backward pass on a part of the batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from fastai_lsuv.core.bulk import on_host, sum_dtype
from fastai_lsuv.core.copies import tensors_in
from fastai_lsuv.core.dry_run import Call, DryRun
from fastai_lsuv.core.probe import first_tensor

SAMPLES = 16  # of the batch: the limits of the verdict are orders of magnitude, which these show


class Gradient(NamedTuple):
    """How strongly the network's output depends on a layer's output y."""

    elasticity: float  # ‖g‖·‖y‖ / (‖v‖·‖out‖) of a random gradient v at the network's output
    growth: float  # the elasticity beside that in a linear network of random weights, √(values of y / values of out)


def gradients(dry_run: DryRun, modules: Sequence[nn.Module]) -> dict[nn.Module, Gradient]:
    """Return how strongly the network's output depends on the output of each module, both relative to their size.

    The elasticity has no unit, so that layers of any scale compare; beside that of a linear network, so do layers of
    any shape. Of several calls the strongest counts. Modules through which no gradient can come are left out, and all
    of them if the model can't be differentiated.
    """
    calls: list[tuple[nn.Module, GradientEdge, Tensor, int]] = []
    outputs: list[Tensor] = []

    def see(module: nn.Module, call: Call, output: Any) -> None:
        y = first_tensor(output)
        if y is not None and y.requires_grad and y.numel():
            if module in watched:
                calls.append((module, get_gradient_edge(y), _norms([y])[0], y.numel()))  # it may be changed in place
            if module is dry_run.model:
                outputs.append(y)

    watched = set(modules)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever is to be said of gradients, training will say
            dry_run.forward(dict.fromkeys([*modules, dry_run.model], see), part=first_samples, with_grad=True)
            (out,) = outputs
            v = torch.randn_like(out)
            came_back = torch.autograd.grad(out, [edge for _, edge, _, _ in calls], v, allow_unused=True)
    except Exception:  # whatever a model's own backward may raise: that is no matter of its initialisation
        return {}
    reached = [(call, g) for call, g in zip(calls, came_back, strict=True) if g is not None]
    norms = on_host([*_norms([v, out, *(g for _, g in reached)]), *(size for (_, _, size, _), _ in reached)])
    (of_v,), (of_out,), *rest = norms
    strongest: dict[nn.Module, Gradient] = {}
    for ((m, _, _, n), _), (of_g,), (size,) in zip(reached, rest[: len(reached)], rest[len(reached) :], strict=True):
        whole = of_v * of_out
        elasticity = of_g * size / whole if whole else math.nan
        gradient = Gradient(elasticity, elasticity / math.sqrt(n / out.numel()))
        strongest[m] = max(strongest.get(m, gradient), gradient)
    return strongest


def _norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Norms in one operation, where a device has one for it."""
    return torch._foreach_norm([t.detach() for t in tensors], 2, sum_dtype(tensors[0]))


def first_samples(call: Call) -> Call:
    """Return the first samples of a batch: of each tensor that has as many as the first.

    Raises:
        ValueError: they are in an object of the user's own.
    """
    batch = next(tensors_in(call), None)
    n = len(batch) if batch is not None and batch.dim() else 0
    if n <= SAMPLES:
        return call
    some: Call = tree_map(lambda o: o[:SAMPLES] if isinstance(o, Tensor) and o.dim() and len(o) == n else o, call)
    if len(next(tensors_in(some))) == n:
        raise ValueError("the batch can't be cut")
    return some
