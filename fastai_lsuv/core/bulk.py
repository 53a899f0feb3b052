"""Many small tensors at once: each operation that a device is given costs as much for one as for some dozens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor


def alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return which of the tensors can be stacked: those of the same shape, dtype and device."""
    groups: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.shape, t.dtype, t.device), []).append(i)
    return [*groups.values()]


def on_host(tensors: Sequence[Tensor]) -> list[tuple[float, ...]]:
    """Return the values of tensors: one wait for each device, whatever their number."""
    groups: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.device, t.dtype, t.dim() == 0), []).append(i)
    home: dict[int, tuple[float, ...]] = {}
    for (_, _, scalars), places in groups.items():
        if scalars:
            values = torch.stack([tensors[i] for i in places]).tolist()
            home |= {i: (value,) for i, value in zip(places, values, strict=True)}
        else:
            rest = iter(torch.cat([tensors[i].reshape(-1) for i in places]).tolist())
            home |= {i: tuple(islice(rest, tensors[i].numel())) for i in places}
    return [home[i] for i in range(len(tensors))]


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which sums over a tensor of any scale are exact enough."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
