"""What follows a layer where no module does: activations that are functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_RELU = "ReluBackward"  # the name of its node in the graph, whose only edge leads to what it is applied to


def followed_by_relu(outputs: Mapping[int, Any], loss: Tensor) -> frozenset[int]:
    """Return the layers to whose output `F.relu` or the like is applied, by the nodes of all layers' outputs.

    Not those behind which a layer does it. Nodes are looked up by the way backward goes, from the loss.
    """
    layers_of: dict[Any, list[int]] = {}
    for layer, node in outputs.items():
        layers_of.setdefault(node, []).append(layer)
    found: set[int] = set()
    todo: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}  # a leaf has no node
    while todo:
        if (node := todo.pop()) not in seen:
            seen.add(node)
            before = [edge[0] for edge in node.next_functions]
            todo += before
            if node.name().startswith(_RELU) and node not in layers_of:
                found.update(layers_of.get(before[0], ()))
    return frozenset(found)
