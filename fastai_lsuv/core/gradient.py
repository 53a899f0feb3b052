"""How a gradient travels back through a network: by one backward pass on a part of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from fastai_lsuv.core.copies import tensors_in
from fastai_lsuv.core.dry_run import Call, DryRun
from fastai_lsuv.core.probe import first_tensor
from fastai_lsuv.core.statistics import on_host

SAMPLES = 16  # of the batch: what is measured is the same within a few per cent for any number


class Gradient(NamedTuple):
    """What comes back to an output y, and how many values there are."""

    elasticity: float  # ‖g‖·‖y‖ / (‖v‖·‖out‖) of a random gradient v at the network's output
    excess: float  # over √(values of y / values of out), which a linear network of random weights has


def gradients(dry_run: DryRun, modules: Sequence[nn.Module]) -> dict[nn.Module, Gradient]:
    """Return by how much more a change of each module's output shows at the network's, both relative to their size.

    The elasticity has no unit, so that layers of any scale compare; less what a linear network would have, so do
    layers of any shape. Of several calls the first counts. Modules through which no gradient can come are left out,
    and all of them if the model can't be differentiated.
    """
    edges: dict[nn.Module, tuple[GradientEdge, Tensor, int]] = {}
    outputs: list[Tensor] = []

    def see(module: nn.Module, call: Call, output: Any) -> None:
        y = first_tensor(output)
        if y is not None and y.requires_grad and module not in edges:
            edges[module] = get_gradient_edge(y), _norm(y), y.numel()  # what is behind it may change it in place

    def see_last(module: nn.Module, call: Call, output: Any) -> None:
        if module in modules:
            see(module, call, output)
        outputs.extend(t for t in [first_tensor(output)] if t is not None and t.requires_grad)

    try:
        dry_run.forward({**dict.fromkeys(modules, see), dry_run.model: see_last}, part=first_samples, with_grad=True)
        out = outputs[0]
        v = torch.randn_like(out)
        came_back = torch.autograd.grad(out, [edge for edge, _, _ in edges.values()], v, allow_unused=True)
    except Exception:  # whatever a model's own backward may raise: that is no matter of its initialisation
        return {}
    whole = _norm(v) * _norm(out)
    pairs = zip(edges, came_back, strict=True)
    found = {module: _norm(g) * edges[module][1] / whole for module, g in pairs if g is not None}
    values = zip(found, on_host([*found.values()]), strict=True)
    return {module: Gradient(e, e / math.sqrt(edges[module][2] / out.numel())) for module, (e,) in values}


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.float32 if x.device.type == "mps" else torch.float64)


def first_samples(call: Call) -> Call:
    """Return the first samples of a batch: of each tensor that has as many as the first."""
    batch = next(tensors_in(call), None)
    n = len(batch) if batch is not None and batch.dim() else 0

    def part(o: Any) -> Any:
        return o[:SAMPLES] if isinstance(o, Tensor) and o.dim() and len(o) == n else o

    return tree_map(part, call) if n > SAMPLES else call
